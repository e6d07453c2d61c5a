"""``pbs_calibrated`` with everything that was tried, in plain PyTorch.

What wins becomes a selector, an order or a parameter of the library, with kernels; what loses stays
here, so that the table of docs/findings.md can be made again.

Legend: see :mod:`pbs.ops.grid`; H query heads, T tiles of B tokens, n sampled rows of a tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pbs.methods.base import AttentionMethod, Call, CallRecord, Recorder
from pbs.ops.block_selection import list_blocks
from pbs.ops.grid import Geometry
from pbs.ops.plan import AttentionPlan

BLOCK = 128


@dataclass(kw_only=True)
class Lab(AttentionMethod):
    """``pbs_calibrated`` with everything that was tried; the defaults are its own.

    Args:
        level: what is searched for a density, in (0, 1): see ``rule``.
        rule: "coverage": blocks by score until ``level`` is covered; "score": every block whose
            score reaches 1 - level; "head", "layer": level is the density of each head (layer), by
            the coverage at which it is reached.
        slope: of the coverage over the window: 1 - level is multiplied by 1 - slope at its start
            and 1 + slope at its end.
        order: "spread", "sampled" (by the rows that the selector samples) or "none".
        order_rows: spread queries at most.
        order_stride: distance of them at least.
        order_turn: whether each head spreads them from another place.
        order_over: what attention that votes is a share of: "past" (the segments before the own) or
            "all".
        order_power: exponent of the mean over them; inf is the maximum.
        segment: S.
        local: blocks before the own that are computed in any case.
        stride: one query of so many is sampled.
        turn: whether which one it is turns with head and tile.
        jitter: whether it also turns from one sampled row to the next.
        power: exponent of the mean over sampled rows; inf is the maximum.
        group: tokens pooled for the smooth scores.
        share: of the smooth scores.
        join: how both are joined: "mean", "maximum" or "geometric".
        screen: share of the candidates, the best by smooth scores, that sampled queries score; the
            others keep their smooth score. 1: all.
        best_key: share of the score that is the block's best key, joined as the rows are.
        columns: single keys a tile computes besides, those of the largest attention left out.
        summaries: mean keys and values that stand for a block left out; 0: none.
        slashes: diagonals of tiles a head computes besides, those that miss most.
        adapt: keys stay where they are in heads that need no more blocks so.
    """

    level: float = 0.9
    rule: str = "coverage"
    slope: float = 0.0
    order: str = "spread"
    order_rows: int = 2048
    order_stride: int = 8
    order_turn: bool = False
    order_over: str = "past"
    order_power: float = 4.0
    segment: int = 1024
    local: int = 1
    stride: int = 16
    turn: bool = True
    jitter: bool = False
    power: float = 4.0
    group: int = 16
    share: float = 0.5
    join: str = "mean"
    screen: float = 1.0
    best_key: float = 0.0
    columns: int = 0
    summaries: int = 0
    slashes: int = 0
    adapt: bool = False

    @override
    def densest(self) -> AttentionMethod | None:
        return None

    @override
    def select(self, call: Call) -> AttentionPlan:
        return self._decide(call).plan

    @override
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        layer_idx: int | None = None,
        geometry: Geometry | None = None,
        recorder: Recorder | None = None,
    ) -> Tensor:
        if not (self.summaries or self.slashes):
            settings: dict[str, Any] = {"geometry": geometry, "recorder": recorder}
            return super().__call__(q, k, v, scale=scale, layer_idx=layer_idx, **settings)
        scale = q.shape[3] ** -0.5 if scale is None else scale
        decision = self._decide(Call(q, k, scale, layer_idx))
        if recorder is not None:
            recorder(CallRecord(layer_idx, q, k, scale, decision.plan))
        return decision.attend(q[0], k[0], v[0], scale, self.summaries)[None]

    def _decide(self, call: Call) -> _Decision:
        """Everything for one sequence of whole tiles."""
        q, k = call.q[0], call.k[0].repeat_interleave(call.q.shape[1] // call.k.shape[1], dim=0)
        length = q.shape[1]
        tiles = Tiles.of(length, self.segment, q.device)
        exact = self._sampled(q, k, call.scale, tiles)  # [H, T, n, N]
        order = self._key_order(q, k, call.scale, exact, tiles)  # [H, N] or None
        scores = self._scores(q, k, call.scale, exact, order, tiles)
        chosen = self._choose(*scores, tiles)
        if self.adapt and order is not None:
            still = self._scores(q, k, call.scale, exact, None, tiles)
            others = self._choose(*still, tiles)
            stays = others.sum(dim=(1, 2)) <= chosen.sum(dim=(1, 2))
            chosen = torch.where(stays[:, None, None], others, chosen)
            place = torch.arange(length, device=q.device)
            order = torch.where(stays[:, None], place, order)
        decision = _Decision(tiles, call, chosen, order)
        if self.columns:
            decision.add_columns(exact, self.columns)
        if self.slashes:
            decision.add_slashes(exact, self.slashes)
        return decision

    def _sampled(self, q: Tensor, k: Tensor, scale: float, tiles: Tiles) -> Tensor:
        """The causal attention of the sampled rows of every tile to every key."""
        num_heads, length, width = q.shape
        heads = torch.arange(num_heads, device=q.device)[:, None, None]
        numbers = torch.arange(tiles.count, device=q.device)[:, None]
        offset = (5 * heads + 3 * numbers) % self.stride if self.turn else 0 * (heads + numbers)
        first = torch.arange(0, BLOCK, self.stride, device=q.device)
        if self.jitter:
            offset = (offset + 7 * torch.arange(len(first), device=q.device)) % self.stride
        rows = numbers * BLOCK + first + offset
        index = rows.flatten(1)[..., None].expand(-1, -1, width)
        logits = q.gather(1, index) @ k.transpose(1, 2) * scale
        places = torch.arange(length, device=q.device)
        logits = logits.float().masked_fill_(places > rows.flatten(1)[..., None], float("-inf"))
        return logits.softmax(dim=-1).unflatten(1, rows.shape[1:])

    def _key_order(
        self, q: Tensor, k: Tensor, scale: float, exact: Tensor, tiles: Tiles
    ) -> Tensor | None:
        """Original position of the key at each place, token 0 first."""
        if self.order == "none":
            return None
        length = q.shape[1]
        places = torch.arange(length, device=q.device)
        segments = places // self.segment
        if self.order == "sampled":
            mass = (exact * (segments < tiles.segments[:, None])[:, None]).flatten(1, 2)
            if self.order_over == "past":
                mass /= mass.sum(dim=-1, keepdim=True).clamp(min=1e-30)
        else:
            count = min(self.order_rows, length // self.order_stride)
            spread = torch.arange(1, count + 1, device=q.device) * length // count - 1
            spread = spread.expand(len(q), -1)
            if self.order_turn:
                heads = torch.arange(len(q), device=q.device)[:, None]
                spread = spread - heads * (length // count) // len(q)
            chosen = q.gather(1, spread[..., None].expand(-1, -1, q.shape[2]))
            logits = (chosen @ k.transpose(1, 2) * scale).float()
            is_past = segments < segments[spread][..., None]
            is_seen = is_past if self.order_over == "past" else places <= spread[..., None]
            mass = logits.masked_fill_(~is_seen, float("-inf")).softmax(dim=-1).nan_to_num_()
            mass *= is_past
        if math.isinf(self.order_power):
            score = mass.amax(dim=1)
        else:  # as logarithms: powers of small probabilities would vanish
            score = mass.log_().mul_(self.order_power).logsumexp(dim=1)
        score[:, 0] = float("inf")
        sorted_ = score.unflatten(1, (-1, self.segment)).argsort(
            dim=-1, descending=True, stable=True
        )
        starts = torch.arange(length // self.segment, device=q.device)[:, None] * self.segment
        return (sorted_ + starts).flatten(1)

    def _scores(
        self,
        q: Tensor,
        k: Tensor,
        scale: float,
        exact: Tensor,
        order: Tensor | None,
        tiles: Tiles,
    ) -> tuple[Tensor, Tensor]:
        """Scores of candidate blocks ``[H, T, T]``, and what the own block holds ``[H, T]``."""
        moved = exact if order is None else _take(exact, order)
        whole, single = _by_block(exact), None
        if self.best_key:
            single = _best_by_block(exact)
        if order is not None:
            whole = torch.where(tiles.past[:, None], _by_block(moved), whole)
            if single is not None:
                single = torch.where(tiles.past[:, None], _best_by_block(moved), single)
        whole = whole * tiles.candidates[:, None]
        total = whole.mean(dim=2).sum(dim=-1, keepdim=True)  # of the sampled rows
        score = _scaled(_mean_of_powers(whole, self.power, dim=2), total)
        if single is not None:
            single = _mean_of_powers(single * tiles.candidates[:, None], self.power, dim=2)
            score = (1 - self.best_key) * score + self.best_key * _scaled(single, total)
        if self.share or self.screen < 1:
            smooth = self._smooth(q, k, scale, order, tiles) * total
            if self.join == "maximum":
                joined = _scaled(torch.maximum(score, smooth), total)
            elif self.join == "geometric":
                powers = score.clamp(min=1e-12) ** (1 - self.share)
                powers = powers * smooth.clamp(min=1e-12) ** self.share * tiles.candidates
                joined = _scaled(powers, total)
            else:
                joined = (1 - self.share) * score + self.share * smooth
            if self.screen < 1:
                counts = (self.screen * tiles.candidates.sum(dim=-1)).ceil()
                ranks = smooth.argsort(dim=-1, descending=True).argsort(dim=-1)
                joined = torch.where(ranks < counts[:, None], joined, self.share * smooth)
            score = joined * tiles.candidates
        return score, 1 - total[..., 0]

    def _smooth(
        self, q: Tensor, k: Tensor, scale: float, order: Tensor | None, tiles: Tiles
    ) -> Tensor:
        """Probability of candidate blocks by queries and keys pooled by ``group``."""
        each = BLOCK // self.group

        def pool(x: Tensor) -> Tensor:
            return x.float().unflatten(1, (-1, self.group)).mean(dim=2)

        def spread(mask: Tensor) -> Tensor:
            return mask.repeat_interleave(each, 0).repeat_interleave(each, 1)

        logits = pool(q) @ pool(k).transpose(1, 2) * scale
        if order is not None:
            moved = pool(_take(k.transpose(1, 2), order).transpose(1, 2))
            past = spread(tiles.past)
            logits = torch.where(past, pool(q) @ moved.transpose(1, 2) * scale, logits)
        logits.masked_fill_(~spread(tiles.candidates), float("-inf"))
        mass = logits.softmax(dim=-1).nan_to_num_()
        return mass.unflatten(2, (-1, each)).sum(-1).unflatten(1, (-1, each)).mean(2)

    def _choose(self, score: Tensor, own: Tensor, tiles: Tiles) -> Tensor:
        """Which candidates are computed, bool ``[H, T, T]``; the block itself always is."""
        forced = tiles.forced(self.local)
        covered = own + (score * forced).sum(dim=-1)
        rest = score.masked_fill(forced | ~tiles.candidates, 0.0)
        ranked, index = rest.sort(dim=-1, descending=True, stable=True)
        before = covered[..., None] + ranked.cumsum(dim=-1) - ranked
        before = torch.empty_like(before).scatter_(-1, index, before)
        free = tiles.candidates & ~forced
        if self.rule == "score":
            taken = rest >= 1 - self.level
        elif self.rule == "coverage":
            time_ = torch.linspace(-1, 1, tiles.count, device=score.device)[:, None]
            taken = before < 1 - (1 - self.level) * (1 + self.slope * time_)
        else:
            wanted = self.level * tiles.count * (tiles.count + 1) / 2
            wanted -= int(forced.sum()) + tiles.count
            needed = before.masked_fill(~free, 2.0).flatten(1)
            if self.rule == "layer":
                needed, wanted = needed.flatten()[None], wanted * len(score)
            last = needed.sort(dim=-1).values[:, max(0, int(wanted))]
            taken = before < last[:, None, None]
        return (taken & free) | forced


@dataclass(frozen=True)
class Tiles:
    """The tiles of a window: which come before the own segment, and which may be chosen."""

    count: int
    segments: Tensor
    past: Tensor
    candidates: Tensor

    @classmethod
    def of(cls, length: int, segment: int, device: torch.device) -> Tiles:
        """Of a window of whole tiles."""
        numbers = torch.arange(length // BLOCK, device=device)
        segments = numbers * BLOCK // segment
        past = segments < segments[:, None]
        return cls(len(numbers), segments, past, numbers < numbers[:, None])

    def forced(self, local: int) -> Tensor:
        """The block of token 0, which stands first in every order, and the last ``local`` ones."""
        numbers = torch.arange(self.count, device=self.past.device)
        is_near = ~self.past & (numbers[:, None] - numbers <= local)
        return self.candidates & ((numbers == 0) | is_near)


@dataclass
class _Decision:
    """Which tiles are computed, ``[H, T, T]``, keys before the own segment in plan order."""

    tiles: Tiles
    call: Call
    chosen: Tensor
    order: Tensor | None
    singles: Tensor | None = None
    diagonals: Tensor | None = None

    @property
    def plan(self) -> AttentionPlan:
        own = torch.eye(self.tiles.count, dtype=torch.bool, device=self.chosen.device)
        own = (self.chosen & ~self.tiles.past) | own
        if self.diagonals is not None:  # for the density alone: pairs can be named twice
            own = own | self.diagonals
        blocks, num_blocks = list_blocks((self.chosen & self.tiles.past)[None])
        windows, num_windows = list_blocks(own[None])
        columns = num_columns = None
        if self.singles is not None:
            num_columns = (self.singles >= 0).sum(dim=-1).int()[None]
            last = torch.where(self.singles >= 0, self.singles, 1 << 30).sort(dim=-1).values
            columns = torch.where(last < 1 << 30, last, 0).int()[None]
        return AttentionPlan(
            self.call.grid(BLOCK),
            1,
            self.chosen.shape[0],
            blocks,
            num_blocks,
            (windows * BLOCK).int(),
            num_windows,
            columns=columns,
            num_columns=num_columns,
            order=None if self.order is None else self.order[None],
        )

    def _computed(self) -> Tensor:
        """Keys that each tile computes, natural order, bool ``[H, T, N]``."""
        wide = self.chosen.repeat_interleave(BLOCK, dim=2)
        if self.order is None:
            return wide
        past = wide & self.tiles.past.repeat_interleave(BLOCK, dim=1)
        index = self.order[:, None].expand_as(past)
        return torch.zeros_like(past).scatter_(2, index, past) | (wide & ~past)

    def add_columns(self, exact: Tensor, count: int) -> None:
        """The keys before the own segment with the largest attention of any sampled row."""
        best = exact.amax(dim=2)
        past = self.tiles.past.repeat_interleave(BLOCK, dim=1)
        value, index = best.masked_fill(self._computed() | ~past, 0.0).topk(count, dim=-1)
        self.singles = torch.where(value > 0, index, -1)

    def add_slashes(self, exact: Tensor, count: int) -> None:
        """Whole diagonals of tiles in natural order, those that hold most of what is left out."""
        left = _by_block(exact * ~self._computed()[:, :, None]).mean(dim=2)
        left = left * self.tiles.candidates
        numbers = torch.arange(self.tiles.count, device=left.device)
        distance = (numbers[:, None] - numbers).clamp(min=0)
        sums = left.new_zeros(len(left), self.tiles.count)
        sums.scatter_add_(1, distance.flatten().expand(len(left), -1), left.flatten(1))
        sums /= self.tiles.count - numbers
        best = sums.topk(count, dim=-1).indices
        hits = (distance[None, None] == best[:, :, None, None]).any(dim=1)
        self.diagonals = hits & self.tiles.candidates & ~(self.chosen & ~self.tiles.past)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, summaries: int) -> Tensor:
        """Masked dense attention with the keys that stand for the blocks left out."""
        per_kv = len(q) // len(k)
        length = q.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        computed = self._computed()
        diagonal = torch.eye(self.tiles.count, dtype=torch.bool, device=q.device)
        wide = diagonal.repeat_interleave(BLOCK, dim=1)
        out = torch.empty_like(q)
        for head in range(len(q)):
            keys, values = k[head // per_kv].float(), v[head // per_kv].float()
            seen = computed[head] | wide
            if self.diagonals is not None:
                seen = seen | self.diagonals[head].repeat_interleave(BLOCK, dim=1)
            logits = [(q[head].float() @ keys.T * scale)]
            logits[0].masked_fill_(~(seen.repeat_interleave(BLOCK, dim=0) & causal), float("-inf"))
            joined = [values]
            if summaries:
                size = BLOCK // summaries
                for order, mask in (
                    (self.order, self.tiles.past),
                    (None, self.tiles.candidates & ~self.tiles.past),
                ):
                    places = slice(None) if order is None else order[head]
                    means, averages = (
                        x[places].unflatten(0, (-1, size)).mean(dim=1) for x in (keys, values)
                    )
                    left = (mask & ~self.chosen[head]).repeat_interleave(summaries, dim=1)
                    extra = q[head].float() @ means.T * scale + math.log(size)
                    extra.masked_fill_(~left.repeat_interleave(BLOCK, dim=0), float("-inf"))
                    logits.append(extra)
                    joined.append(averages)
            weights = torch.cat(logits, dim=1).softmax(dim=-1)
            out[head] = (weights @ torch.cat(joined)).to(q.dtype)
        return out


def _take(x: Tensor, order: Tensor) -> Tensor:
    """The last dim of ``[H, ..., N]`` in the order ``[H, N]``."""
    return torch.stack([one[..., index] for one, index in zip(x, order, strict=True)])


def _by_block(mass: Tensor) -> Tensor:
    return mass.unflatten(-1, (-1, BLOCK)).sum(dim=-1)


def _best_by_block(mass: Tensor) -> Tensor:
    return mass.unflatten(-1, (-1, BLOCK)).amax(dim=-1)


def _mean_of_powers(mass: Tensor, power: float, *, dim: int) -> Tensor:
    if power == 1:
        return mass.mean(dim=dim)
    if math.isinf(power):
        return mass.amax(dim=dim)
    largest = mass.amax().clamp(min=1e-30)
    return (mass / largest).pow_(power).mean(dim=dim).pow_(1 / power) * largest


def _scaled(score: Tensor, total: Tensor) -> Tensor:
    """With the total that the plain mean of the rows has."""
    return score * (total / score.sum(dim=-1, keepdim=True).clamp(min=1e-30))

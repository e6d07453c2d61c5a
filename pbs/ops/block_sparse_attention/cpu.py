"""Fast PyTorch on a CPU: rows of equal length are gathered and computed together.

A query tile has two parts. Keys that all its queries see (blocks, columns) need no mask and take
nearly all the time; windows need a mask per token. Each part runs through PyTorch's CPU flash
attention, which also returns the log-sum-exp, and the two are merged by it. Query tiles (over all
sequences and heads) are grouped by their number of keys, so that one call computes many of them.

Legend: see :mod:`pbs.ops.grid`; R rows (query tiles) of a group, L keys of each, M query tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pbs.ops.block_sparse_attention.common import weighted_values
from pbs.ops.permutation import gather_keys
from pbs.ops.plan import AttentionPlan
from pbs.ops.stages import stage

# Gathered keys per call: K and V of so many stay in a cache, and the copies are small beside the
# inputs. Half as many took up to 6 % longer, twice as many as long or, at D = 128, longer.
MAX_GATHERED_TOKENS = 1 << 14


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float
) -> Tensor:
    """See :func:`pbs.ops.block_sparse_attention.api.block_sparse_attention`."""
    rows = _Rows.build(q, k, v, plan, scale)
    out, lse = rows.run_whole_tiles()
    rows.merge_windows(out, lse)
    out = out.view(*q.shape[:2], -1, q.shape[3])[:, :, : q.shape[2]]
    if plan.query_order is None:
        return out.contiguous()
    restored = torch.empty_like(q, memory_format=torch.contiguous_format)
    return restored.scatter_(2, plan.query_order.unsqueeze(-1).expand_as(out), out)


@dataclass
class _Rows:
    """All query tiles of all sequences and heads as one list of rows."""

    plan: AttentionPlan
    scale: float
    queries: Tensor  # [rows, M, D]
    keys: Tensor  # [Z * Hkv * Nk, D]
    values: Tensor  # [Z * Hkv * Nk, D]
    key_base: Tensor  # [rows] first token of the row's KV head in `keys`
    order: Tensor | None  # [Z * Ho * Nk] position of the key at each place
    order_base: Tensor | None  # [rows]
    tiles: tuple[Tensor, Tensor] | None  # keys and values in plan order, [Z * Ho * Tk, tile * D]
    tile_base: Tensor  # [rows] first tile of the row's head in them
    head: Tensor  # [rows] query head
    is_finite: bool  # whether all keys and values are

    @classmethod
    def build(cls, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> _Rows:
        batch, num_heads, num_queries, head_dim = q.shape
        grid = plan.grid
        if plan.query_order is not None:
            q = q.gather(2, plan.query_order.unsqueeze(-1).expand_as(q))
        padding = grid.num_query_tiles * grid.query_tile - num_queries
        queries = torch.nn.functional.pad(q, (0, 0, 0, padding)) if padding else q
        sequence = torch.arange(batch).view(-1, 1, 1)
        head = torch.arange(num_heads).view(1, -1, 1)
        shape = (batch, num_heads, grid.num_query_tiles)

        def first(tensor_heads: int, each: int) -> Tensor:
            """Where a row's head begins, of a tensor with so many entries a head."""
            own = head // (num_heads // tensor_heads)
            base = (sequence * tensor_heads + own) * each
            return base.expand(shape).flatten()

        tiles = _tiles(k, v, plan) if plan.columns is None else None
        order_heads = k.shape[1] if plan.order is None else plan.order.shape[1]
        return cls(
            plan,
            scale,
            queries.reshape(-1, grid.query_tile, head_dim),
            k.reshape(-1, head_dim),
            v.reshape(-1, head_dim),
            first(k.shape[1], grid.num_keys),
            None if plan.order is None else plan.order.reshape(-1),
            None if plan.order is None else first(order_heads, grid.num_keys),
            tiles,
            first(order_heads, grid.num_key_tiles),
            head.expand(shape).flatten(),
            _all_finite(k) and _all_finite(v),
        )

    def run_whole_tiles(self) -> tuple[Tensor, Tensor]:
        """Attention over the keys that need no mask: out [rows, M, D] and lse [rows, M]."""
        plan, tile = self.plan, self.plan.grid.key_tile
        blocks, num_blocks = self._lists(plan.blocks, plan.num_blocks)
        if self.tiles is not None:
            return self._run_tiles(blocks, num_blocks)
        out = torch.zeros_like(self.queries)
        lse = torch.full(self.queries.shape[:2], float("-inf"), dtype=torch.float32)
        assert plan.columns is not None
        assert plan.num_columns is not None
        columns, num_columns = self._lists(plan.columns, plan.num_columns)
        for group, length in _groups(num_blocks * tile + num_columns, MAX_GATHERED_TOKENS):
            if not length:
                continue
            tokens = self._tokens(blocks[group] * tile, num_blocks[group], tile)
            if self.order is not None and self.order_base is not None:
                places = (self.order_base[group, None] + tokens).clamp(min=0)
                tokens = torch.where(tokens >= 0, self.order[places], -1)
            extra = self._tokens(columns[group], num_columns[group], 1)
            tokens = torch.cat([tokens, extra], dim=1)
            valid = tokens >= 0
            mask = None if bool(valid.all()) else valid[:, None, :]
            keys = self._gathered(group, tokens)
            out[group], lse[group] = self._attend(self.queries[group], *keys, mask)
        return out, lse

    def _run_tiles(self, blocks: Tensor, num_blocks: Tensor) -> tuple[Tensor, Tensor]:
        """The same for plans without columns, whose keys lie in tiles."""
        assert self.tiles is not None
        tile = self.plan.grid.key_tile
        places = self.tile_base[:, None] + blocks
        out = torch.zeros_like(self.queries)
        lse = torch.full(out.shape[:2], float("-inf"), dtype=torch.float32)
        most = max(MAX_GATHERED_TOKENS // tile, blocks.shape[1])
        # Written again and again: memory that the system gives anew costs more than the copies.
        room = [x.new_empty(most, x.shape[1]) for x in self.tiles]
        for group, count in _groups(num_blocks, MAX_GATHERED_TOKENS // tile):
            if count:
                index = places[group, :count].flatten()
                k, v = (
                    torch.index_select(x, 0, index, out=copies[: len(index)]).view(
                        -1, 1, count * tile, out.shape[2]
                    )
                    for x, copies in zip(self.tiles, room, strict=True)
                )
                out[group], lse[group] = self._attend(self.queries[group], k, v, None)
        self.tiles = None  # windows want memory, and natural keys
        return out, lse

    def merge_windows(self, out: Tensor, lse: Tensor) -> None:
        """Add the keys that need a mask per token to out and lse, in place."""
        plan, grid = self.plan, self.plan.grid
        windows, num_windows = self._lists(plan.windows, plan.num_windows)
        positions = plan.query_positions().expand(plan.batch_size, plan.num_heads, -1)
        positions = positions.reshape(-1, grid.query_tile)
        for group, length in _groups(num_windows * grid.key_tile, MAX_GATHERED_TOKENS):
            if not length:
                continue
            tokens = self._tokens(windows[group], num_windows[group], grid.key_tile)
            tokens = torch.where(tokens < grid.num_keys, tokens, -1)
            keys, rows = self._gathered(group, tokens), positions[group]
            if plan.local_window is None and _are_alike(tokens, rows):
                tokens, rows = tokens[:1], rows[:1]  # one mask for all
            seen = (tokens[:, None, :] >= 0) & (tokens[:, None, :] <= rows[..., None])
            if plan.local_window is not None:
                init, local = plan.local_window[self.head[group]].long()[..., None, None].unbind(1)
                near = rows[..., None] - tokens[:, None, :] < local
                seen &= (tokens[:, None, :] < init) | near
            part, part_lse = self._attend(self.queries[group], *keys, seen)
            # The share of the first part in the joint softmax; 0 where it has no keys.
            share = torch.sigmoid(lse[group] - part_lse).nan_to_num(0.0).unsqueeze(-1)
            out[group] = (part + (out[group] - part) * share).to(out.dtype)

    def _gathered(self, group: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[R, 1, L, D]`` at ``tokens [R, L]`` (-1: any)."""
        index = (self.key_base[group, None] + tokens.clamp(min=0)).flatten()
        shape = (len(group), 1, tokens.shape[1], -1)
        return (
            self.keys.index_select(0, index).view(shape),
            self.values.index_select(0, index).view(shape),
        )

    def _attend(
        self, queries: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attention of ``queries [R, M, D]``; ``mask [R or 1, M or 1, L]`` says what is seen."""
        q = queries.unsqueeze(1)
        bias = doubtful = None
        if mask is not None:
            # Hidden pairs weigh 0, and 0 * NaN is NaN: keys that are not finite are left out for
            # all, then put back for the queries that see them.
            doubtful = None if self.is_finite else _not_finite(k, v)
            if doubtful is not None:
                whole = (k.squeeze(1), v.squeeze(1))
                k, v = (x.masked_fill(doubtful.unsqueeze(1).unsqueeze(-1), 0.0) for x in (k, v))
            bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
            bias = bias.expand(len(q), q.shape[2], -1).unsqueeze(1)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=bias, scale=self.scale
        )
        out, lse = out.squeeze(1), lse.squeeze(1).float()
        if mask is not None:
            empty = ~mask.any(-1).expand(len(q), q.shape[2])
            if bool(empty.any()):
                out.masked_fill_(empty.unsqueeze(-1), 0.0)
                lse = lse.masked_fill(empty, float("-inf"))
            if doubtful is not None:
                spoiled = (mask & doubtful.unsqueeze(1)).any(-1).expand(-1, q.shape[2])
                exact, exact_lse = _attend_exactly(q.squeeze(1), *whole, mask, self.scale)
                out = torch.where(spoiled.unsqueeze(-1), exact.to(out.dtype), out)
                lse = torch.where(spoiled, exact_lse, lse)
        return out, lse

    def _lists(self, entries: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """One list per row, spread over sequences and heads: [rows, width] and [rows]."""
        shape = (self.plan.batch_size, self.plan.num_heads, entries.shape[2])
        return (
            entries.expand(*shape, -1).flatten(0, 2).long(),
            counts.expand(shape).flatten().long(),
        )

    @staticmethod
    def _tokens(starts: Tensor, counts: Tensor, tile: int) -> Tensor:
        """Keys of the ranges [start, start + tile), [R, L] of the longest row; -1 pads others."""
        width = int(counts.max())
        members = starts[:, :width].unsqueeze(-1) + torch.arange(tile)
        valid = torch.arange(width) < counts[:, None]
        return torch.where(valid[..., None], members, -1).flatten(1)


def _tiles(k: Tensor, v: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
    """Keys and values in plan order, a tile a row: copied once, so that lists copy whole tiles."""
    grid = plan.grid
    if plan.order is not None:
        with stage("gather"):
            v = gather_keys(v, plan.order)
            k = gather_keys(k, plan.order) if plan.ordered_keys is None else plan.ordered_keys
    missing = grid.num_key_tiles * grid.key_tile - grid.num_keys
    if missing:  # of the last tile, which no list names
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, missing)) for x in (k, v))
    return (
        k.reshape(-1, grid.key_tile * k.shape[3]),
        v.reshape(-1, grid.key_tile * v.shape[3]),
    )


def _are_alike(tokens: Tensor, rows: Tensor) -> bool:
    """Whether all rows see their tokens ``[R, L]`` as the first does, by their distances."""
    same = tokens - rows[:, :1] == tokens[:1] - rows[:1, :1]
    steps = rows - rows[:, :1] == rows[:1] - rows[:1, :1]
    return bool(same.all()) and bool(steps.all()) and bool((tokens >= 0).all())


def _all_finite(x: Tensor) -> bool:
    # A sum is not finite if a term is not; that it may overflow costs time, no more.
    return math.isfinite(float(x.sum(dtype=torch.float32)))


def _not_finite(k: Tensor, v: Tensor) -> Tensor | None:
    """Keys ``[R, L]`` of ``[R, 1, L, D]`` with a number that is not finite; None: no key has."""
    if _all_finite(k) and _all_finite(v):
        return None
    return ~(k.isfinite() & v.isfinite()).all(-1).squeeze(1)


def _attend_exactly(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Eager fp32 attention ``[R, M, D]``, in which hidden keys and values may be anything."""
    logits = (q.float() @ k.float().transpose(-1, -2)).mul_(scale)
    logits = logits.masked_fill_(~mask, float("-inf"))
    weights = logits.softmax(dim=-1)
    return weighted_values(weights, v.float(), mask), logits.logsumexp(dim=-1)


def _groups(counts: Tensor, most: int) -> Iterator[tuple[Tensor, int]]:
    """Rows that count the same, together at most ``most`` unless one alone counts more."""
    lengths, order = counts.sort(stable=True)
    values, sizes = lengths.unique_consecutive(return_counts=True)
    for count, rows in zip(values.tolist(), order.split(sizes.tolist()), strict=True):
        step = max(1, most // max(count, 1))
        for group in rows.split(step):
            yield group, count

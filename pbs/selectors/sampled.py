"""Exact scores of a few queries of each block, which protect keys that few queries want.

Legend: see :mod:`pbs.ops.grid`; r sampled rows of a tile, n candidate blocks, g keys of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from pbs.checks import check_block_size, check_positive_int
from pbs.ops.grid import BlockGrid
from pbs.ops.pooling import mean_pool
from pbs.ops.tile_logsumexp import tile_logsumexp
from pbs.selectors.base import Selector
from pbs.selectors.own import OwnKeys

# Masses held at once: 2^22 fp32 values are 16 MB. A GPU needs rows enough to fill it: 128 MB.
MAX_SCORES = 1 << 22
MAX_SCORES_GPU = 1 << 25


@dataclass(kw_only=True)
class SampledSelector(Selector):
    """The attention of every s-th query to each block, rows of a tile joined by a power mean.

    What a query's own segment and the forced block hold takes part in the softmax and counts as
    covered: a threshold is one of (estimated) coverage. Which row of s is sampled turns with head
    and tile, so that no position is always missed. A plain mean of rows says what a block holds on
    average; a power mean also keeps the block that one row cannot do without. Joined with scores
    of queries and keys pooled by ``group``, which see what the sampled rows miss.

    Args:
        stride: s; costs 1 / s of dense attention's logits.
        power: exponent of the mean over rows; 1 is the mean.
        group: tokens pooled for the second scores, a power of two of at least 16, a block at most
            (larger ones are taken as a block); 0 leaves them out.
        share: of the second scores, in [0, 1].
    """

    stride: int = 16
    power: float = 4.0
    group: int = 16
    share: float = 0.5

    def __post_init__(self) -> None:
        check_positive_int(self.stride, name="stride")
        if not self.power >= 1:
            raise ValueError(f"power must be at least 1, got {self.power}")
        if self.group != 0:
            check_block_size(self.group, name="group")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must lie in [0, 1], got {self.share}")

    def block_probabilities(
        self, q: Tensor, k: Tensor, *, scale: float, grid: BlockGrid, candidates: Tensor
    ) -> Tensor:
        """See the base class, and :meth:`block_scores`."""
        return self.block_scores(q, k, scale=scale, grid=grid, candidates=candidates, own=None)[0]

    def block_scores(
        self,
        q: Tensor,
        k: Tensor,
        *,
        scale: float,
        grid: BlockGrid,
        candidates: Tensor,
        own: OwnKeys | None,
    ) -> tuple[Tensor, Tensor]:
        """See the base class; own keys are credited, and scored where they are candidates."""
        natural = k if own is None else own.keys
        limits = candidates.sum(dim=-1)
        moved = limits if own is None or own.num_moved is None else own.num_moved
        positions = torch.arange(grid.offset, grid.num_keys, device=q.device)[None, None]
        if own is not None:
            positions = own.positions(grid)
        rows, is_row = self._rows(q.shape[1], grid, q.device)  # [H, Tq, r]
        group = min(self.group, grid.key_tile) if self.share else 0
        pooled: tuple[Tensor, Tensor, Tensor] | None = None
        if group:
            means = mean_pool(k, group)
            others = means if natural is k else mean_pool(natural, group)
            pooled = mean_pool(q, group), means, others
        scores = q.new_zeros(
            *q.shape[:2], grid.num_query_tiles, grid.num_key_tiles, dtype=torch.float32
        )
        per_head = q.shape[1] // natural.shape[1]
        size = q.shape[0] * per_head * (rows.shape[2] + grid.query_tile // (group or 128))
        limit = MAX_SCORES_GPU if q.is_cuda else MAX_SCORES
        step = max(1, limit // (size * grid.num_key_tiles))
        for head in range(natural.shape[1]):
            heads = slice(head * per_head, (head + 1) * per_head)
            for first in range(0, grid.num_query_tiles, step):
                tiles = slice(first, min(first + step, grid.num_query_tiles))
                part = _Part(heads, tiles, limits[tiles], moved[tiles], scale)
                index, kept = rows[heads, tiles], is_row[tiles]
                exact = part.exact(q, k, natural, index, positions, grid)  # [Z, G, t, r, Tk]
                joined = _power_mean(exact, kept, self.power)
                if pooled is not None:
                    smooth = part.pooled(*pooled, group, grid)  # [Z, G, t, Tk]
                    total = joined.sum(dim=-1, keepdim=True)
                    joined = (1 - self.share) * joined + self.share * smooth * total
                scores[:, heads, tiles] = joined
        return scores, (1 - scores.sum(dim=-1)).clamp(min=0.0)

    def _rows(self, num_heads: int, grid: BlockGrid, device: torch.device) -> tuple[Tensor, Tensor]:
        """Which rows of q stand for each tile, int64 ``[H, Tq, r]``, and which count, bool."""
        tiles = torch.arange(grid.num_query_tiles, device=device)[:, None]
        first = tiles * grid.query_tile
        counts = (grid.num_queries - first).clamp(max=grid.query_tile)
        steps = counts.clamp(max=self.stride)
        places = torch.arange(-(-grid.query_tile // self.stride), device=device) * steps
        heads = torch.arange(num_heads, device=device)[:, None, None]
        offsets = (5 * heads + 3 * tiles) % steps
        rows = (first + places + offsets).clamp(max=grid.num_queries - 1)
        return rows, places < counts

    @override
    def arranged_scores(
        self,
        q: Tensor,
        k: Tensor,
        *,
        scale: float,
        grid: BlockGrid,
        candidates: Tensor,
        own: OwnKeys | None,
    ) -> tuple[Tensor, Tensor | None]:
        """See the base class; :meth:`block_scores` takes both orders at once."""
        return self.block_scores(q, k, scale=scale, grid=grid, candidates=candidates, own=own)


@dataclass(frozen=True)
class _Part:
    """Some query tiles of the heads of a key/value head; t tiles, G heads.

    Attributes:
        heads: the query heads.
        tiles: the query tiles.
        limits: candidates of each tile, int ``[t]``.
        moved: those of keys in plan order, int ``[t]``; later ones are of keys in natural order.
        scale: factor of the logits.
    """

    heads: slice
    tiles: slice
    limits: Tensor
    moved: Tensor
    scale: float

    def exact(
        self, q: Tensor, k: Tensor, natural: Tensor, rows: Tensor, seen: Tensor, grid: BlockGrid
    ) -> Tensor:
        """The attention of rows ``[G, t, r]`` to each candidate block, ``[Z, G, t, r, Tk]``.

        ``seen`` is the position of each query, ``[1 or Z, 1 or Hq, Nq]``.
        """
        index = rows.flatten(1)[None].expand(q.shape[0], -1, -1)
        queries = q[:, self.heads].gather(2, index[..., None].expand(-1, -1, -1, q.shape[3]))
        until = seen.expand(q.shape[0], q.shape[1], -1)[:, self.heads].gather(2, index) + 1
        ends = self.moved.repeat_interleave(rows.shape[2]).expand_as(until) * grid.key_tile
        # Moved queries stand elsewhere in each sequence.
        sequences = [slice(i, i + 1) for i in range(q.shape[0])] if len(seen) > 1 else [slice(None)]
        held = [
            self._held(queries[z], k[z], natural[z], ends[z][0], until[z][0], grid.key_tile)
            for z in sequences
        ]
        sums = torch.cat(held).unflatten(2, rows.shape[1:])
        # Every row sees its own key.
        return self._of_candidates(sums.softmax(dim=-1), 1)

    def pooled(self, q: Tensor, k: Tensor, natural: Tensor, group: int, grid: BlockGrid) -> Tensor:
        """Probability of each candidate block by pooled queries and keys, ``[Z, G, t, Tk]``."""
        each, wide = grid.query_tile // group, grid.key_tile // group
        rows = q[:, self.heads, self.tiles.start * each : self.tiles.stop * each]
        count = rows.shape[2]
        ends, until = (
            (x.repeat_interleave(each)[:count] * wide).expand(rows.shape[1], -1)
            for x in (self.moved, self.limits)
        )
        sums = self._held(rows, k, natural, ends, until, wide)
        weights = sums.softmax(dim=-1).nan_to_num_()  # of rows without candidates
        padding = each * len(self.limits) - count
        weights = torch.nn.functional.pad(weights, (0, 0, 0, padding))
        totals = weights.unflatten(2, (-1, each)).sum(dim=3)
        tiles = torch.arange(len(self.limits), device=q.device)
        members = (count - tiles * each).clamp(max=each)
        return self._of_candidates(totals / members[:, None], 0)

    def _held(
        self, rows: Tensor, k: Tensor, natural: Tensor, ends: Tensor, until: Tensor, tile: int
    ) -> Tensor:
        """Log-sums of moved keys up to ``ends`` and natural ones from there ``until``."""
        kv = self.heads.start // rows.shape[1]
        own = natural[:, kv : kv + 1]
        if k.data_ptr() == natural.data_ptr():  # no key has moved
            return tile_logsumexp(
                rows, own, torch.zeros_like(ends), until, tile=tile, scale=self.scale
            )
        per_order = k.shape[1] // natural.shape[1]
        keys = k[:, kv * per_order : (kv + 1) * per_order]
        first = tile_logsumexp(
            rows, keys, torch.zeros_like(ends), ends, tile=tile, scale=self.scale
        )
        return torch.maximum(
            first, tile_logsumexp(rows, own, ends, until, tile=tile, scale=self.scale)
        )

    def _of_candidates(self, weights: Tensor, num_between: int) -> Tensor:
        """0 at blocks that are no candidates; so many dims stand between tiles and blocks."""
        blocks = torch.arange(weights.shape[-1], device=weights.device)
        keep = blocks < self.limits[:, None]
        return weights * keep.view(len(keep), *[1] * num_between, -1)


def _power_mean(mass: Tensor, is_row: Tensor, power: float) -> Tensor:
    """Over the rows of ``[Z, H, t, r, n]`` that count, with the total that the plain mean has."""
    mass = mass * is_row[..., None]
    count = is_row.sum(dim=-1)[:, None]
    mean = mass.sum(dim=3) / count
    if power == 1:
        return mean
    # Powers of small numbers vanish: the largest is 1 first.
    largest = mass.amax(dim=(3, 4), keepdim=True).clamp(min=1e-30)
    joined = ((mass / largest).pow_(power).sum(dim=3) / count).pow_(1 / power)
    total = joined.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    return joined * (mean.sum(dim=-1, keepdim=True) / total)

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
from pbs.ops.tile_masses import tile_masses
from pbs.selectors.base import Selector
from pbs.selectors.own import OwnKeys

# Log-sums held at once: 2^22 fp32 values are 16 MB. A GPU needs rows enough to fill it: 256 MB.
MAX_SCORES = 1 << 22
MAX_SCORES_GPU = 1 << 26


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
        rows, counts = self._rows(q.shape[1], grid, q.device)  # [H, Tq, r], [Tq]
        smooth: _Smooth | None = None
        if self.share and self.group:
            smooth = _Smooth.of(q, k, natural, min(self.group, grid.key_tile), grid)
        scores = q.new_zeros(
            *q.shape[:2], grid.num_query_tiles, grid.num_key_tiles, dtype=torch.float32
        )
        each = rows.shape[2] + (0 if smooth is None else smooth.each)
        limit = MAX_SCORES_GPU if q.is_cuda else MAX_SCORES
        step = max(1, limit // (q.shape[0] * q.shape[1] * each * grid.num_key_tiles))
        for first in range(0, grid.num_query_tiles, step):
            tiles = slice(first, min(first + step, grid.num_query_tiles))
            width = grid.num_key_tiles
            if own is None or own.query_order is None:  # no row sees later tiles
                width = grid.num_causal_key_tiles(tiles.stop)
            part = _Part(tiles, width, limits[tiles], moved[tiles], scale, grid.key_tile)
            second = None if smooth is None else smooth.sums(part)
            scores[:, :, tiles, :width] = tile_masses(
                part.sums(q, k, natural, rows[:, tiles], positions),
                counts[tiles],
                limits[tiles],
                power=self.power,
                smooth=second,
                smooth_counts=None if smooth is None else smooth.counts[tiles],
                share=self.share,
            )
        return scores, (1 - scores.sum(dim=-1)).clamp(min=0.0)

    def _rows(self, num_heads: int, grid: BlockGrid, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows of q that stand for a tile, int64 ``[H, Tq, r]``; how many count, int ``[Tq]``."""
        tiles = torch.arange(grid.num_query_tiles, device=device)[:, None]
        first = tiles * grid.query_tile
        counts = (grid.num_queries - first).clamp(max=grid.query_tile)
        steps = counts.clamp(max=self.stride)
        places = torch.arange(-(-grid.query_tile // self.stride), device=device) * steps
        heads = torch.arange(num_heads, device=device)[:, None, None]
        offsets = (5 * heads + 3 * tiles) % steps
        rows = (first + places + offsets).clamp(max=grid.num_queries - 1)
        return rows, (places < counts).sum(dim=-1)

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
    """Some query tiles; t tiles.

    Attributes:
        tiles: which.
        width: no row of them sees more key tiles.
        limits: candidates of each tile, int ``[t]``.
        moved: those of keys in plan order, int ``[t]``; later ones are of keys in natural order.
        scale: factor of the logits.
        tile: keys of a key tile.
    """

    tiles: slice
    width: int
    limits: Tensor
    moved: Tensor
    scale: float
    tile: int

    def sums(self, q: Tensor, k: Tensor, natural: Tensor, rows: Tensor, seen: Tensor) -> Tensor:
        """Log-sums of rows ``[H, t, r]`` over all that they see, ``[Z, H, t, r, width]``.

        ``seen`` is the position of each query, ``[1 or Z, 1 or H, Nq]``.
        """
        index = rows.flatten(1)[None].expand(q.shape[0], -1, -1)
        queries = q.gather(2, index[..., None].expand(-1, -1, -1, q.shape[3]))
        until = seen.expand(q.shape[0], q.shape[1], -1).gather(2, index) + 1
        ends = self.moved.repeat_interleave(rows.shape[2]).expand(q.shape[1], -1) * self.tile
        # Moved queries stand elsewhere in each sequence.
        sequences = [slice(i, i + 1) for i in range(q.shape[0])] if len(seen) > 1 else [slice(None)]
        held = [
            self.log_sums(queries[z], k[z], natural[z], ends, until[z][0], self.tile)
            for z in sequences
        ]
        return torch.cat(held).unflatten(2, rows.shape[1:])

    def log_sums(
        self, rows: Tensor, k: Tensor, natural: Tensor, ends: Tensor, until: Tensor, tile: int
    ) -> Tensor:
        """Log-sums of moved keys up to ``ends`` and natural ones from there ``until``."""
        num_keys = self.width * tile
        k, natural = k[:, :, :num_keys], natural[:, :, :num_keys]
        if k.data_ptr() == natural.data_ptr():  # no key has moved
            return tile_logsumexp(rows, k, until, tile=tile, scale=self.scale)
        return tile_logsumexp(
            rows, k, ends, natural=natural, until=until, tile=tile, scale=self.scale
        )


@dataclass(frozen=True)
class _Smooth:
    """Queries and keys pooled by a few tokens; e pooled queries of a tile.

    Attributes:
        q: means of queries, ``[Z, H, Tq e, D]``.
        k: means of keys in plan order.
        natural: of those in natural order.
        each: e.
        wide: pooled keys of a key tile.
        counts: how many leading pooled queries of a tile exist, int ``[Tq]``.
    """

    q: Tensor
    k: Tensor
    natural: Tensor
    each: int
    wide: int
    counts: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, natural: Tensor, group: int, grid: BlockGrid) -> _Smooth:
        """Pooled by ``group`` tokens."""
        means = mean_pool(q, group)
        each, count = grid.query_tile // group, means.shape[2]
        tiles = torch.arange(grid.num_query_tiles, device=q.device)
        padding = grid.num_query_tiles * each - count
        keys = mean_pool(k, group)
        return cls(
            torch.nn.functional.pad(means, (0, 0, 0, padding)) if padding else means,
            keys,
            keys if natural is k else mean_pool(natural, group),
            each,
            grid.key_tile // group,
            (count - tiles * each).clamp(max=each),
        )

    def sums(self, part: _Part) -> Tensor:
        """Log-sums over the candidates of each tile, ``[Z, H, t, e, width]``."""
        rows = self.q[:, :, part.tiles.start * self.each : part.tiles.stop * self.each]
        ends, until = (
            (x.repeat_interleave(self.each) * self.wide).expand(rows.shape[1], -1)
            for x in (part.moved, part.limits)
        )
        sums = part.log_sums(rows, self.k, self.natural, ends, until, self.wide)
        return sums.unflatten(2, (-1, self.each))

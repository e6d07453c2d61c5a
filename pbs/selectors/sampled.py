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
from pbs.selectors.base import Selector
from pbs.selectors.own import OwnKeys


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
        own = OwnKeys.after(candidates, k, grid) if own is None else own
        limits = candidates.sum(dim=-1)
        moved = (limits if own.num_moved is None else own.num_moved).tolist()
        positions = own.positions(grid)
        group = min(self.group, grid.key_tile)
        pooled = natural = None
        if group and self.share:
            pooled = natural = mean_pool(k, group)
            if own.num_moved is not None:
                natural = mean_pool(own.keys, group)
        scores = q.new_zeros(
            *q.shape[:2], grid.num_query_tiles, grid.num_key_tiles, dtype=torch.float32
        )
        for tile, (num_blocks, num_moved) in enumerate(zip(limits.tolist(), moved, strict=True)):
            if not num_blocks:
                continue
            end, start = num_blocks * grid.key_tile, num_moved * grid.key_tile
            rows = self._rows(tile, q, grid)  # [H, r]
            index = rows[None, :, :, None].expand(q.shape[0], -1, -1, q.shape[3])
            queries = q.gather(2, index).float()
            past = _joined(queries, k, own.keys, start, end) * scale  # [Z, H, r, n B]
            seen = positions.expand(-1, q.shape[1], -1).gather(
                2, rows[None].expand(positions.shape[0], -1, -1)
            )
            beside = _grouped(queries, own.keys[:, :, end : end + own.width]) * scale
            places = torch.arange(end, end + beside.shape[-1], device=q.device)
            beside = beside.masked_fill(places > seen.unsqueeze(-1), float("-inf"))
            weights = torch.cat([past, beside], dim=-1).softmax(dim=-1)[..., :end]
            mass = weights.unflatten(-1, (num_blocks, grid.key_tile)).sum(dim=-1)  # [Z, H, r, n]
            joined = _power_mean(mass, self.power)
            if pooled is not None and natural is not None:
                total = joined.sum(dim=-1, keepdim=True)
                parts = (pooled, natural, start // group, end // group)
                smooth = self._pooled(q, parts, tile, scale, grid, group)
                joined = (1 - self.share) * joined + self.share * smooth * total
            scores[:, :, tile, :num_blocks] = joined
        return scores, (1 - scores.sum(dim=-1)).clamp(min=0.0)

    def _rows(self, tile: int, q: Tensor, grid: BlockGrid) -> Tensor:
        """Which rows of q stand for a tile, int64 ``[H, r]``."""
        first = tile * grid.query_tile
        count = min(grid.query_tile, q.shape[2] - first)
        step = min(self.stride, count)
        heads = torch.arange(q.shape[1], device=q.device)
        offsets = (5 * heads + 3 * tile) % step
        rows = first + torch.arange(0, count, step, device=q.device)
        return (rows + offsets[:, None]).clamp(max=q.shape[2] - 1)

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

    @staticmethod
    def _pooled(
        q: Tensor,
        keys: tuple[Tensor, Tensor, int, int],
        tile: int,
        scale: float,
        grid: BlockGrid,
        group: int,
    ) -> Tensor:
        """Probability of each candidate block by pooled queries and keys, ``[Z, H, n]``."""
        rows = q[:, :, tile * grid.query_tile : (tile + 1) * grid.query_tile]
        logits = _joined(mean_pool(rows, group), *keys) * scale
        weights = logits.softmax(dim=-1).mean(dim=2)
        return weights.unflatten(-1, (-1, grid.key_tile // group)).sum(dim=-1)


def _grouped(queries: Tensor, keys: Tensor) -> Tensor:
    """Products, fp32 ``[Z, H, r, N]``, of ``[Z, H, r, D]`` and the ``[Z, Ho, N, D]`` of groups."""
    queries = queries.unflatten(1, (keys.shape[1], -1))
    return (queries @ keys.float().unsqueeze(2).transpose(-1, -2)).flatten(1, 2)


def _joined(queries: Tensor, moved: Tensor, natural: Tensor, start: int, end: int) -> Tensor:
    """:func:`_grouped` of ``start`` moved keys, then of natural ones up to ``end``."""
    if start >= end:
        return _grouped(queries, moved[:, :, :end])
    if not start:
        return _grouped(queries, natural[:, :, :end])
    first = _grouped(queries, moved[:, :, :start])
    return torch.cat([first, _grouped(queries, natural[:, :, start:end])], dim=-1)


def _power_mean(mass: Tensor, power: float) -> Tensor:
    """Over the rows of ``[Z, H, r, n]``, with the total that the plain mean has."""
    mean = mass.mean(dim=2)
    if power == 1:
        return mean
    # Powers of small numbers vanish: the largest is 1 first.
    largest = mass.amax(dim=(2, 3), keepdim=True).clamp(min=1e-30)
    joined = (mass / largest).pow(power).mean(dim=2).pow(1 / power)
    total = joined.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    return joined * (mean.sum(dim=-1, keepdim=True) / total)

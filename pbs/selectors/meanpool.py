"""Mean pooling: a block's mean stands for the block. Legend: see :mod:`pbs.ops.grid`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from pbs.checks import check_choice
from pbs.ops.block_selection import select_pooled_blocks
from pbs.ops.grid import BlockGrid
from pbs.ops.permutation import gather_and_pool
from pbs.ops.pooling import block_logits, mean_pool, softmax_over
from pbs.selectors.base import Selector
from pbs.selectors.own import OwnKeys


@dataclass(kw_only=True)
class MeanPoolSelector(Selector):
    """softmax(q̄ k̄ᵀ scale) over the candidates, q̄ and k̄ the means of the blocks.

    Args:
        pad_mean: "real" takes the mean of a partial last block over its real tokens; "reference"
            divides by B as the original code does (zero padding, damped scores).

    Source: arXiv 2510.21270, section 3.3 and Algorithm 2.
    """

    pad_mean: str = "real"

    def __post_init__(self) -> None:
        check_choice(self.pad_mean, ("real", "reference"), name="pad_mean")

    def block_probabilities(
        self, q: Tensor, k: Tensor, *, scale: float, grid: BlockGrid, candidates: Tensor
    ) -> Tensor:
        """See the base class."""
        q_blocks = mean_pool(q, grid.query_tile, pad_mean=self.pad_mean)
        k_blocks = mean_pool(k, grid.key_tile, pad_mean=self.pad_mean)
        return softmax_over(block_logits(q_blocks, k_blocks) * scale, candidates)

    @override
    def gather(self, k: Tensor, order: Tensor, *, tile: int) -> tuple[Tensor, Tensor | None]:
        """See the base class. One pass over the keys does both."""
        return gather_and_pool(k, order, tile=tile, pad_mean=self.pad_mean)

    @override
    def select(
        self,
        q: Tensor,
        k: Tensor,
        *,
        scale: float,
        grid: BlockGrid,
        candidates: Tensor,
        num_candidates: Tensor,
        limits: Tensor,
        threshold: float,
        forced: Tensor | None,
        own: OwnKeys | None = None,
        k_means: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See the base class. The probabilities are never in memory, unless two orders meet."""
        if own is not None and own.num_moved is not None:
            return super().select(
                q,
                k,
                scale=scale,
                grid=grid,
                candidates=candidates,
                num_candidates=num_candidates,
                limits=limits,
                threshold=threshold,
                forced=forced,
                own=own,
            )
        if k_means is None:
            k_means = mean_pool(k, grid.key_tile, pad_mean=self.pad_mean)
        return select_pooled_blocks(
            mean_pool(q, grid.query_tile, pad_mean=self.pad_mean),
            k_means,
            scale=scale,
            threshold=threshold,
            candidates=num_candidates,
            limits=limits,
            forced=forced,
            grid=grid,
        )

"""Antidiagonal sampling: every stride x stride square is scored by its antidiagonal.

Legend: see :mod:`pbs.ops.grid`; s stride, a group is s consecutive tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pbs.checks import check_choice
from pbs.ops.antidiagonal import antidiagonal_block_sums, query_groups
from pbs.ops.grid import BlockGrid
from pbs.selectors.base import Selector


@dataclass(kw_only=True)
class AntidiagonalSelector(Selector):
    """XAttention's scores, here over the candidate blocks (PBS-Attn+ on permuted keys).

    Args:
        stride: s; must divide the block size. Larger is cheaper and coarser: 1 / (2 s) of dense.
        normaliser: softmax over the "candidates" only, or over all "causal" groups, so that what
            the own segment holds counts as covered.

    Source: arXiv 2503.16428, section 3; on permuted keys arXiv 2510.21270, PBS-Attn+. The paper
    does not say which normaliser it uses.
    """

    stride: int = 8
    normaliser: str = "candidates"

    def __post_init__(self) -> None:
        check_stride(self.stride)
        check_choice(self.normaliser, ("candidates", "causal"), name="normaliser")

    def block_probabilities(
        self, q: Tensor, k: Tensor, *, scale: float, grid: BlockGrid, candidates: Tensor
    ) -> Tensor:
        """See the base class; with normaliser "causal" rows sum to less than 1."""
        limits = candidates.sum(dim=-1) if self.normaliser == "candidates" else None
        sums = antidiagonal_block_sums(
            q, k, stride=self.stride, scale=scale, grid=grid, limits=limits
        )
        return sums.masked_fill(~candidates, 0.0) / query_groups(grid, self.stride, q.device)


def check_stride(stride: int) -> None:
    """A positive integer."""
    if isinstance(stride, bool) or not isinstance(stride, int):
        raise TypeError(f"stride must be an integer, got {stride!r}")
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}; the papers use 8 and 16")

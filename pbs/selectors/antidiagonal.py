"""Antidiagonal sampling: every stride x stride square is scored by its antidiagonal.

Legend: see :mod:`pbs.ops.grid`; s stride, a group is s consecutive tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pbs.checks import check_choice
from pbs.ops.antidiagonal import antidiagonal_block_sums, own_logsumexp, query_groups
from pbs.ops.grid import BlockGrid
from pbs.selectors.base import Selector
from pbs.selectors.own import NORMALISERS, OwnKeys


@dataclass(kw_only=True)
class AntidiagonalSelector(Selector):
    """XAttention's scores, here over the candidate blocks (PBS-Attn+ on permuted keys).

    Args:
        stride: s; must divide the block size. Larger is cheaper and coarser: 1 / (2 s) of dense.
        normaliser: "candidates": a softmax over them alone; the threshold is relative to what they
            hold. "causal": a softmax over all that a query sees. What its own segment holds, by the
            same sums over the segment's keys in natural order, and the forced block then count as
            covered: the threshold is one of (estimated) coverage, and reached with fewer blocks.

    Source: arXiv 2503.16428, section 3; on permuted keys arXiv 2510.21270, PBS-Attn+. The paper
    does not say which normaliser it uses.
    """

    stride: int = 8
    normaliser: str = "candidates"

    def __post_init__(self) -> None:
        check_stride(self.stride)
        check_choice(self.normaliser, NORMALISERS, name="normaliser")

    def block_probabilities(
        self, q: Tensor, k: Tensor, *, scale: float, grid: BlockGrid, candidates: Tensor
    ) -> Tensor:
        """See the base class; with normaliser "causal" see :meth:`block_scores`."""
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
    ) -> tuple[Tensor, Tensor | None]:
        """See the base class; own keys are credited with normaliser "causal"."""
        limits = candidates.sum(dim=-1)
        beside = None
        if self.normaliser == "causal":
            own = OwnKeys.after(candidates, k, grid) if own is None else own
            beside = own_logsumexp(
                q,
                own.keys,
                stride=self.stride,
                scale=scale,
                grid=grid,
                starts=limits * grid.key_tile,
                width=own.width,
                positions=own.positions(grid),
            )
        sums = antidiagonal_block_sums(
            q, k, stride=self.stride, scale=scale, grid=grid, limits=limits, beside=beside
        )
        shares = sums / query_groups(grid, self.stride, q.device)
        if beside is None:
            return shares, None
        return shares, (1 - shares.sum(dim=-1)).clamp(min=0.0)


def check_stride(stride: int) -> None:
    """A positive integer."""
    if isinstance(stride, bool) or not isinstance(stride, int):
        raise TypeError(f"stride must be an integer, got {stride!r}")
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}; the papers use 8 and 16")

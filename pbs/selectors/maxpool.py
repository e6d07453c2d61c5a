"""Max pooling: the largest value of each dim stands for the block."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pbs.ops.grid import BlockGrid
from pbs.ops.pooling import block_logits, softmax_over
from pbs.selectors.base import Selector
from pbs.selectors.pooling import max_pool


@dataclass(kw_only=True)
class MaxPoolSelector(Selector):
    """As mean pooling, with the element-wise maximum of queries and keys.

    Source: the second pooling of the reference code of arXiv 2510.21270.
    """

    def block_probabilities(
        self, q: Tensor, k: Tensor, *, scale: float, grid: BlockGrid, candidates: Tensor
    ) -> Tensor:
        """See the base class."""
        logits = block_logits(max_pool(q, grid.query_tile), max_pool(k, grid.key_tile))
        return softmax_over(logits * scale, candidates)

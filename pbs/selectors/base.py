"""What a selector is. Legend: see :mod:`pbs.ops.grid`."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from pbs.ops.grid import BlockGrid


class Selector(ABC):
    """Estimates the attention probability of key blocks. Never reads v, never sees the output."""

    @abstractmethod
    def block_probabilities(
        self, q: Tensor, k: Tensor, *, scale: float, grid: BlockGrid, candidates: Tensor
    ) -> Tensor:
        """Probability of each candidate key block, per query block.

        Args:
            q: ``[Z, Hq, Nq, D]`` in natural order.
            k: ``[Z, Ho, Nk, D]`` in plan order; Hq is a multiple of Ho.
            scale: factor of the logits.
            grid: the blocks.
            candidates: blocks that may be selected, bool ``[Tq, Tk]``.

        Returns:
            fp32 ``[Z, Hq, Tq, Tk]``; rows sum to 1 over the candidates, a row without candidates
            is 0.
        """

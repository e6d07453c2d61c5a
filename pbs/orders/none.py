"""No permutation: the ablation of PBS, and every method that does not reorder."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from pbs.orders.base import Order


@dataclass(kw_only=True)
class NaturalOrder(Order):
    """Keys stay where they are."""

    @override
    def compute(
        self,
        q: Tensor,
        k: Tensor,
        *,
        scale: float,
        block_size: int,
        segment_size: int,
        shared: bool,
    ) -> None:
        """See the base class."""
        return

"""No permutation: the ablation of PBS, and every method that does not reorder."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pbs.orders.base import Order


@dataclass(kw_only=True)
class NaturalOrder(Order):
    """Keys stay where they are."""

    def compute(
        self,
        q: Tensor,  # noqa: ARG002 - the interface of all orders
        k: Tensor,  # noqa: ARG002
        *,
        scale: float,  # noqa: ARG002
        block_size: int,  # noqa: ARG002
        segment_size: int,  # noqa: ARG002
        shared: bool,  # noqa: ARG002
    ) -> None:
        """See the base class."""
        return

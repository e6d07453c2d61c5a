"""The paper's order: the last block of queries says which keys matter."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pbs.orders.base import ImportanceOrder


@dataclass(kw_only=True)
class LastBlockOrder(ImportanceOrder):
    """Importance by the last B queries (arXiv 2510.21270, section 3.2)."""

    def proxy_queries(self, q: Tensor, *, block_size: int) -> Tensor:
        """The last B queries, or all if there are fewer."""
        return q[:, :, -block_size:]

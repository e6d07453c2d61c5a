"""The average query says which keys matter: the cheapest proxy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from pbs.orders.base import ImportanceOrder


@dataclass(kw_only=True)
class AverageQueryOrder(ImportanceOrder):
    """Importance by one query, the mean of all (an ablation of arXiv 2510.21270)."""

    @override
    def proxy_queries(self, q: Tensor, *, block_size: int) -> Tensor:
        """The mean query, fp32 ``[Z, Hq, 1, D]``."""
        return q.mean(dim=2, keepdim=True, dtype=torch.float32)

"""Randomly drawn queries say which keys matter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pbs.checks import check_positive_int
from pbs.orders.base import ImportanceOrder, check_seed
from pbs.orders.random import scramble


@dataclass(kw_only=True)
class RandomQueryOrder(ImportanceOrder):
    """Importance by randomly drawn queries (an ablation of arXiv 2510.21270).

    All sequences, heads and layers use the same rows, so that a sequence gets the same order alone
    and in a batch, and a call can be repeated.

    Args:
        num_queries: how many are drawn, without repetition; more cost more and vote more steadily.
            None: B. All of them if there are fewer.
        seed: of the draw.
    """

    num_queries: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_queries is not None:
            check_positive_int(self.num_queries, name="num_queries")
        check_seed(self.seed)

    def proxy_queries(self, q: Tensor, *, block_size: int) -> Tensor:
        """The drawn queries in natural order."""
        rows = torch.arange(q.shape[2], device=q.device)
        # By hash, not by a generator: no copy to the device, which would wait for it.
        ranks = scramble(rows + scramble(torch.full_like(rows, self.seed)))
        drawn = ranks.argsort(stable=True)[: self.num_queries or block_size].sort().values
        return q[:, :, drawn]

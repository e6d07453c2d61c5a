"""Keys sorted by the attention that queries all over the prompt pay them.

Legend: see :mod:`pbs.ops.grid`; R spread queries, G query heads of a key/value head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from pbs.checks import check_positive_int
from pbs.ops.key_power_sums import key_power_sums
from pbs.ops.permutation.reference import sort_segments
from pbs.orders.base import Order


@dataclass(kw_only=True)
class SpreadOrder(Order):
    """Each segment sorted by the power mean of the attention of spread queries, highest first.

    The last block's queries (:class:`pbs.orders.last_block.LastBlockOrder`) say what the end of the
    prompt wants; a key that few earlier queries want then stands in a cold block and is lost with
    it. Here queries at equal distances vote by their causal attention over the segments before
    their own, and a large power lets one query that wants a key much outweigh many that want it a
    little. R of them cost R / Nk of dense attention's operations, in two passes. More of them make
    a better order (docs/findings.md). A selector that samples should sample others: those that made
    the blocks praise them.

    Args:
        num_rows: R at most.
        stride: queries from one to the next at least, so that a short prompt asks fewer.
        power: exponent of the mean; 1 is the mean.
    """

    num_rows: int = 2048
    stride: int = 8
    power: float = 4.0

    def __post_init__(self) -> None:
        check_positive_int(self.num_rows, name="num_rows")
        check_positive_int(self.stride, name="stride")
        if not self.power >= 1:
            raise ValueError(f"power must be at least 1, got {self.power}")

    def num_asked(self, num_queries: int) -> int:
        """How many queries vote on a prompt's keys."""
        return min(self.num_rows, -(-num_queries // self.stride))

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
    ) -> Tensor | None:
        """See the base class."""
        num_keys, num_queries = k.shape[2], q.shape[2]
        num_sorted = num_keys // segment_size * segment_size
        if not num_sorted:
            return None
        count = self.num_asked(num_queries)
        rows = (torch.arange(1, count + 1, device=q.device) * num_queries) // count - 1
        # A query votes on the segments before its own: its own is not moved.
        ends = (rows + num_keys - num_queries) // segment_size * segment_size
        votes = key_power_sums(
            q[:, :, rows], k[:, :, :num_sorted], ends, scale=scale, power=self.power
        )
        if shared:
            votes = votes.unflatten(1, (k.shape[1], -1)).logsumexp(dim=2)
        return sort_segments(votes, num_keys=num_keys, segment_size=segment_size)

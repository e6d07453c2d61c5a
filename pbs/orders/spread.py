"""Keys sorted by the attention that queries all over the prompt pay them.

Legend: see :mod:`pbs.ops.grid`; R spread queries, G query heads of a key/value head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from pbs.checks import check_positive_int
from pbs.ops.permutation.reference import sort_segments
from pbs.orders.base import Order


@dataclass(kw_only=True)
class SpreadOrder(Order):
    """Each segment sorted by the power mean of the attention of spread queries, highest first.

    The last block's queries (:class:`pbs.orders.last_block.LastBlockOrder`) say what the end of the
    prompt wants; a key that few earlier queries want then stands in a cold block and is lost with
    it. Here R queries at equal distances vote by their causal attention over the segments before
    their own, and a large power lets one query that wants a key much outweigh many that want it a
    little. Costs R / Nq of dense attention's logits.

    Args:
        num_rows: R; all queries if there are fewer.
        power: exponent of the mean; 1 is the mean.
    """

    num_rows: int = 256
    power: float = 4.0

    def __post_init__(self) -> None:
        check_positive_int(self.num_rows, name="num_rows")
        if not self.power >= 1:
            raise ValueError(f"power must be at least 1, got {self.power}")

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
        count = min(self.num_rows, num_queries)
        rows = (torch.arange(1, count + 1, device=q.device) * num_queries) // count - 1
        # A query votes on the segments before its own: its own is computed in any case.
        starts = (rows + num_keys - num_queries) // segment_size * segment_size
        is_past = torch.arange(num_sorted, device=q.device) < starts[:, None]  # [R, N]
        votes = is_past.sum(dim=0).clamp(min=1)
        groups = q.shape[1] // k.shape[1]
        scores = []
        for head in range(k.shape[1]):
            queries = q[:, head * groups : (head + 1) * groups, rows].float()  # [Z, G, R, D]
            keys = k[:, head, None, :num_sorted].float().transpose(-1, -2)
            logits = (queries @ keys).mul_(scale).masked_fill_(~is_past, float("-inf"))
            weights = logits.softmax(dim=-1).nan_to_num_()  # of queries without a past
            # Products of small numbers: the largest is 1 first, as its order alone counts.
            largest = weights.amax(dim=(-1, -2), keepdim=True).clamp(min=1e-30)
            score = (weights / largest).pow(self.power).sum(dim=2) / votes
            scores.append(score.mean(dim=1, keepdim=True) if shared else score)
        return sort_segments(torch.cat(scores, dim=1), num_keys=num_keys, segment_size=segment_size)

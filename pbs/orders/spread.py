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

# Logits held at once: 2^23 fp32 values are 32 MB.
MAX_LOGITS = 1 << 23


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
        groups = q.shape[1] // k.shape[1]
        chunk = max(1, MAX_LOGITS // (q.shape[0] * groups * num_sorted))
        scores = []
        for head in range(k.shape[1]):
            keys = k[:, head, None, :num_sorted].float().transpose(-1, -2)
            score = q.new_full((), float("-inf"), dtype=torch.float32)
            for part, past in zip(rows.split(chunk), is_past.split(chunk), strict=True):
                queries = q[:, head * groups : (head + 1) * groups, part].float()  # [Z, G, r, D]
                logits = (queries @ keys).mul_(scale).masked_fill_(~past, float("-inf"))
                # Sums of powers as logarithms: powers of small probabilities would vanish.
                logits = logits.log_softmax(dim=-1).mul_(self.power)
                logits.masked_fill_(~past, float("-inf"))  # of queries without a past, too
                score = torch.logaddexp(score, logits.logsumexp(dim=2))
            scores.append(score.logsumexp(dim=1, keepdim=True) if shared else score)
        return sort_segments(torch.cat(scores, dim=1), num_keys=num_keys, segment_size=segment_size)

"""Each query block in turn takes the keys that are most similar to its mean.

Legend: see :mod:`pbs.ops.grid`; n complete segments, C = S / B blocks of a segment, G query heads
that share a key/value head (1 if an order is shared).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from pbs.orders.base import Order


@dataclass(kw_only=True)
class GreedyOrder(Order):
    """Key block j of a segment gets the B free keys with the largest q̄ kᵀ, q̄ the mean of block j's
    own queries; the blocks of a segment choose in turn, the last takes what is left.

    Inside a block keys stand by descending similarity, ties in natural order. Before the first
    query (a filled cache) blocks use the mean of the first query block.

    Source: the ablation "greedy" of arXiv 2510.21270. All segments and heads choose at once.
    """

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
        num_kv_heads, num_keys = k.shape[1:3]
        num_sorted = num_keys // segment_size * segment_size
        if not num_sorted:
            return None
        centroids = query_centroids(q, num_keys=num_keys, block_size=block_size)
        centroids = centroids.unflatten(1, (num_kv_heads, -1))[..., : num_sorted // block_size, :]
        if shared:
            centroids = centroids.mean(dim=2, keepdim=True)
        starts = torch.arange(0, num_sorted, segment_size, device=k.device)[:, None]
        orders = []
        for head in range(num_kv_heads):
            # [Z, G, n C, D] -> [Z, n, G C, D]: the keys of a segment are read once for all heads.
            means = centroids[:, head].unflatten(2, (-1, segment_size // block_size))
            means = means.transpose(1, 2).flatten(2, 3)
            keys = k[:, head, :num_sorted].unflatten(1, (-1, segment_size)).float()
            similarity = means @ keys.transpose(-1, -2)  # [Z, n, G C, S]
            similarity = similarity.unflatten(2, (centroids.shape[2], -1)).transpose(1, 2)
            orders.append((_take_in_turn(similarity, block_size) + starts).flatten(2))
        order = torch.cat(orders, dim=1)
        tail = torch.arange(num_sorted, num_keys, device=k.device)
        return torch.cat([order, tail.expand(*order.shape[:2], -1)], dim=-1)


def query_centroids(q: Tensor, *, num_keys: int, block_size: int) -> Tensor:
    """Mean query at the positions of each key block, fp32 ``[Z, Hq, Tk, D]``.

    The queries, ``[Z, Hq, Nq, D]``, are the last of ``num_keys`` positions. Blocks before the first
    query get the mean of the first block that has queries.
    """
    first = num_keys - q.shape[2]
    num_empty = first // block_size
    num_blocks = -(-num_keys // block_size) - num_empty
    # Zeros before and after fill the first and the last block; they do not count in the mean.
    before = first - num_empty * block_size
    after = num_blocks * block_size - before - q.shape[2]
    blocks = pad(q, (0, 0, before, after)).unflatten(2, (num_blocks, block_size))
    starts = torch.arange(num_empty, num_empty + num_blocks, device=q.device) * block_size
    counts = (starts + block_size).clamp(max=num_keys) - starts.clamp(min=first)
    means = blocks.sum(dim=3, dtype=torch.float32) / counts[:, None]
    return torch.cat([means[:, :, :1].expand(-1, -1, num_empty, -1), means], dim=2)


def _take_in_turn(similarity: Tensor, block_size: int) -> Tensor:
    """Places in each segment, int64 ``[Z, G, n, S]``, from similarities ``[Z, G, n, C, S]``."""
    # A finite floor: a free key must rank before every taken one.
    similarity = similarity.clamp(min=torch.finfo(torch.float32).min)
    taken = torch.zeros_like(similarity[..., 0, :], dtype=torch.bool)
    parts = []
    for row in similarity.unbind(dim=-2):
        free = row.masked_fill(taken, float("-inf"))
        ranked = free.argsort(dim=-1, descending=True, stable=True)
        parts.append(ranked[..., :block_size])
        taken.scatter_(-1, parts[-1], True)
    return torch.cat(parts, dim=-1)

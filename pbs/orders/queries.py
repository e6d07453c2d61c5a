"""Where queries move: queries that look at the same key block share a tile.

Legend: see :mod:`pbs.ops.grid`; G query heads per key head, chunk S consecutive query rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from pbs.ops.permutation.reference import MAX_SCORES
from pbs.ops.pooling import mean_pool


def order_queries(
    q: Tensor, k: Tensor, *, candidates: Tensor, block_size: int, segment_size: int
) -> Tensor:
    """Sort each chunk of S query rows by the key block that is most similar to each query.

    Similarity is q k̄ᵀ with k̄ the mean of a block. Queries of one key block, and ties, keep their
    natural order, as does a chunk without selectable blocks. The incomplete last chunk is sorted
    like the others.

    Args:
        q: ``[Z, Hq, Nq, D]``.
        k: ``[Z, Ho, Nk, D]``, natural or permuted; Hq is a multiple of Ho.
        candidates: blocks that may be selected, bool ``[Tq, Tk]``, the same for all query blocks of
            a chunk.
        block_size: B.
        segment_size: S, a multiple of B.

    Returns:
        Original row of the query at each place, int64 ``[Z, Hq, Nq]``. Costs 1 / B of dense
        attention and ``MAX_SCORES`` scores (or those of one chunk) of memory.

    Source: arXiv 2510.21270, the ablation of the permutation target.
    """
    batch, num_heads, num_queries, _ = q.shape
    k_blocks = mean_pool(k, block_size)
    groups = num_heads // k_blocks.shape[1]
    num_chunks = max(1, MAX_SCORES // (batch * groups * k_blocks.shape[2] * segment_size))
    nearest = torch.empty(q.shape[:3], dtype=torch.long, device=q.device)
    for head in range(k_blocks.shape[1]):
        blocks = k_blocks[:, head].transpose(-1, -2)  # [Z, D, Tk]
        mine = slice(head * groups, (head + 1) * groups)
        for start in range(0, num_queries, num_chunks * segment_size):
            rows = slice(start, start + num_chunks * segment_size)
            queries = q[:, mine, rows].float()
            scores = (queries.flatten(1, 2) @ blocks).unflatten(1, queries.shape[1:3])
            tiles = torch.arange(start, start + queries.shape[2], device=q.device) // block_size
            scores.masked_fill_(~candidates[tiles], float("-inf"))
            nearest[:, mine, rows] = scores.argmax(dim=-1)
    # Rows past the last query sort behind all real ones.
    filled = pad(nearest, (0, -num_queries % segment_size), value=k_blocks.shape[2])
    chunks = filled.unflatten(-1, (-1, segment_size))
    starts = torch.arange(0, filled.shape[-1], segment_size, device=q.device)[:, None]
    order = (chunks.argsort(dim=-1, stable=True) + starts).flatten(-2)
    return order[..., :num_queries].contiguous()


def gather_queries(q: Tensor, query_order: Tensor) -> Tensor:
    """The queries in the given order, ``[Z, Hq, Nq, D]``."""
    return q.gather(2, query_order.unsqueeze(-1).expand_as(q))

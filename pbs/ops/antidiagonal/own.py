"""Antidiagonal scores of the keys that queries compute anyway, as one number a query group.

Eager PyTorch for every device: they are few. Legend: :mod:`pbs.ops.grid`; s stride, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from pbs.ops.grid import BlockGrid

# Elements of a temporary: 16 MiB in fp32.
MAX_ELEMENTS = 1 << 22


def own_logsumexp(
    q: Tensor,
    k: Tensor,
    *,
    stride: int,
    scale: float,
    grid: BlockGrid,
    starts: Tensor,
    width: int,
    positions: Tensor,
) -> Tensor:
    """log of the sum of exp(score) over the key groups from a tile's ``starts`` on that it sees.

    Scores are those of :func:`pbs.ops.antidiagonal.antidiagonal_block_sums`, of which this is the
    ``beside``. A query group sees the key groups that start at or before its latest position.

    Args:
        q: ``[Z, Hq, Nq, D]`` in plan order.
        k: ``[Z, Hkv, Nk, D]`` in natural order, Hq a multiple of Hkv.
        stride: s, divides both tiles.
        scale: factor of the logits, positive.
        grid: the blocks.
        starts: first key of each query tile, a multiple of s, int ``[Tq]``.
        width: W; groups from ``starts + width`` on are seen by no query of the tile.
        positions: of the queries, int64 ``[1 or Z, 1 or Hq, Nq]``.

    Returns:
        fp32 ``[Z, Hq, Tq query_tile / s]``; -inf for a group without a real query.
    """
    batch, num_heads, _, head_dim = q.shape
    groups = num_heads // k.shape[1]
    tile = grid.query_tile
    missing = grid.num_query_tiles * tile - grid.num_queries
    # The latest position of each query group, -1 where it has no real query: [.., .., Tq, tile / s]
    latest = pad(positions, (0, missing), value=-1).unflatten(-1, (-1, stride)).amax(dim=-1)
    latest = latest.expand(batch, num_heads, -1).unflatten(-1, (-1, tile // stride))
    tokens = starts[:, None] + torch.arange(width, device=q.device)  # [Tq, W]
    first_tokens = tokens[:, ::stride]
    found = torch.empty(latest.shape, dtype=torch.float32, device=q.device)
    step = max(1, MAX_ELEMENTS // (batch * head_dim * max(width, groups * tile)))
    for first in range(0, grid.num_query_tiles, step):
        tiles = slice(first, first + step)
        rows = q[:, :, first * tile : (first + step) * tile].float()
        rows = pad(rows, (0, 0, 0, -rows.shape[2] % tile)).unflatten(
            2, (-1, tile // stride, stride)
        )
        rows = rows.flip(4).flatten(4)  # [Z, Hq, tiles, tile / s, s D]
        exists = (tokens[tiles] < grid.num_keys)[..., None]
        for head in range(k.shape[1]):
            mine = slice(head * groups, (head + 1) * groups)
            keys = k[:, head, tokens[tiles].clamp(max=grid.num_keys - 1)].float()
            keys = keys.masked_fill(~exists, 0.0)  # [Z, tiles, W, D]
            keys = keys.unflatten(2, (-1, stride)).flatten(3).unsqueeze(1)
            logits = (rows[:, mine] @ keys.transpose(-1, -2)).mul_(scale / stride)
            hidden = first_tokens[tiles, None] > latest[:, mine, tiles, :, None]
            found[:, mine, tiles] = logits.masked_fill_(hidden, float("-inf")).logsumexp(dim=-1)
    return found.flatten(2)

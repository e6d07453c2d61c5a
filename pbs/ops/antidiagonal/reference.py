"""Eager PyTorch, in chunks of query tiles. Legend: :mod:`pbs.ops.grid`; s stride."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from pbs.ops.grid import BlockGrid

# Logits held at once, over all sequences and heads: 64 MiB in fp32, and as much for their softmax.
MAX_LOGITS = 1 << 24


def antidiagonal_block_sums(
    q: Tensor, k: Tensor, *, stride: int, scale: float, grid: BlockGrid, ends: Tensor
) -> Tensor:
    """One matrix product per chunk: groups reshaped to vectors of s D, queries reversed in them."""
    batch, num_heads = q.shape[:2]
    groups = num_heads // k.shape[1]
    k = _pad_tokens(k, grid.num_key_tiles * grid.key_tile)
    k = k.unflatten(2, (-1, stride)).flatten(3).unsqueeze(2)  # [Z, Ho, 1, groups, s D]
    per_tile = grid.query_tile // stride
    num_rows = grid.num_query_tiles * per_tile
    step = max(1, MAX_LOGITS // (batch * num_heads * per_tile * k.shape[3]))
    shape = (batch, num_heads, grid.num_query_tiles, grid.num_key_tiles)
    sums = torch.zeros(shape, dtype=torch.float32, device=q.device)
    places = torch.arange(k.shape[3], device=q.device)
    for tile in range(0, grid.num_query_tiles, step):
        rows = slice(tile * per_tile, min((tile + step) * per_tile, num_rows))
        # Key tiles after the last group that any row attends to have no probability.
        end = -(-int(ends[rows].max()) * stride // grid.key_tile)
        if not end:
            continue
        columns = slice(0, end * grid.key_tile // stride)
        tokens = q[:, :, rows.start * stride : rows.stop * stride]
        tokens = _pad_tokens(tokens, (rows.stop - rows.start) * stride)
        # [Z, Ho, G, groups, s D]
        reverse = tokens.unflatten(2, (-1, stride)).flip(3).flatten(3)
        reverse = reverse.unflatten(1, (k.shape[1], groups))
        logits = (reverse @ k[..., columns, :].transpose(-1, -2)).float()
        logits *= scale / stride
        hidden = places[columns] >= ends[rows, None]
        weights = logits.masked_fill_(hidden, float("-inf")).softmax(dim=-1)
        del logits
        # A group that attends to nothing has only -inf: its softmax is NaN.
        weights.masked_fill_(hidden, 0.0)
        tiled = weights.unflatten(-1, (end, -1)).unflatten(3, (-1, per_tile)).sum(dim=(4, 6))
        sums[:, :, tile : tile + step, :end] = tiled.flatten(1, 2)
    return sums


def _pad_tokens(x: Tensor, num_tokens: int) -> Tensor:
    """Zeros after the last token, without a copy if there is nothing to add."""
    missing = num_tokens - x.shape[2]
    return pad(x, (0, 0, 0, missing)) if missing else x

"""Eager PyTorch, in chunks of query tiles. Legend: :mod:`pbs.ops.grid`; s stride."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from pbs.ops.grid import BlockGrid

# Logits held at once, over all sequences and heads of a group: 64 MiB in fp32, and as much for
# their softmax.
MAX_LOGITS = 1 << 24


def antidiagonal_block_sums(
    q: Tensor,
    k: Tensor,
    *,
    stride: int,
    scale: float,
    grid: BlockGrid,
    ends: Tensor,
    beside: Tensor | None,
) -> Tensor:
    """One key/value head at a time, which alone is held in fp32; see :func:`_head_sums`."""
    batch, num_heads = q.shape[:2]
    shape = (batch, num_heads, grid.num_query_tiles, grid.num_key_tiles)
    sums = torch.zeros(shape, dtype=torch.float32, device=q.device)
    groups = num_heads // k.shape[1]
    for head in range(k.shape[1]):
        keys = _pad_tokens(k[:, head].float(), grid.num_key_tiles * grid.key_tile)
        keys = keys.unflatten(1, (-1, stride)).flatten(2)  # [Z, groups, s D]
        mine = slice(head * groups, (head + 1) * groups)
        _head_sums(
            sums[:, mine],
            q[:, mine],
            keys,
            stride=stride,
            scale=scale,
            grid=grid,
            ends=ends,
            beside=None if beside is None else beside[:, mine],
        )
    return sums


def _head_sums(
    sums: Tensor,
    q: Tensor,
    keys: Tensor,
    *,
    stride: int,
    scale: float,
    grid: BlockGrid,
    ends: Tensor,
    beside: Tensor | None,
) -> None:
    """One matrix product per chunk: groups reshaped to vectors of s D, queries reversed in them.

    Writes into ``sums [Z, G, Tq, Tk]`` for the heads ``q [Z, G, Nq, D]`` of one key/value head. The
    products are in fp32 whatever the inputs: they are sums over s D terms, which 16 bits would
    round by more than their differences, or not hold at all.
    """
    per_tile = grid.query_tile // stride
    num_rows = grid.num_query_tiles * per_tile
    step = max(1, MAX_LOGITS // (q.shape[0] * q.shape[1] * per_tile * keys.shape[1]))
    places = torch.arange(keys.shape[1], device=q.device)
    for tile in range(0, grid.num_query_tiles, step):
        rows = slice(tile * per_tile, min((tile + step) * per_tile, num_rows))
        # Key tiles after the last group that any row attends to have no probability.
        end = -(-int(ends[rows].max()) * stride // grid.key_tile)
        if not end:
            continue
        columns = slice(0, end * grid.key_tile // stride)
        tokens = q[:, :, rows.start * stride : rows.stop * stride].float()
        tokens = _pad_tokens(tokens, (rows.stop - rows.start) * stride)
        reverse = tokens.unflatten(2, (-1, stride)).flip(3).flatten(3)  # [Z, G, groups, s D]
        logits = reverse.flatten(1, 2) @ keys[:, columns].transpose(-1, -2)
        logits = logits.unflatten(1, reverse.shape[1:3]).mul_(scale / stride)
        hidden = places[columns] >= ends[rows, None]
        logits.masked_fill_(hidden, float("-inf"))
        if beside is None:
            weights = logits.softmax(dim=-1)
        else:
            total = torch.logaddexp(logits.logsumexp(dim=-1), beside[:, :, rows])
            weights = logits.sub_(total.unsqueeze(-1)).exp_()
        del logits
        # A group that attends to nothing has only -inf: its softmax is NaN.
        weights.masked_fill_(hidden, 0.0)
        tiled = weights.unflatten(-1, (end, -1)).unflatten(2, (-1, per_tile)).sum(dim=(3, 5))
        sums[:, :, tile : tile + step, :end] = tiled


def _pad_tokens(x: Tensor, num_tokens: int) -> Tensor:
    """Zeros after the last token, without a copy if there is nothing to add."""
    missing = num_tokens - x.shape[-2]
    return pad(x, (0, 0, 0, missing)) if missing else x

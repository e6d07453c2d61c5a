"""Eager PyTorch. Legend: see :mod:`pbs.ops.grid`."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_pool(x: Tensor, tile: int, *, pad_mean: str) -> Tensor:
    """See :func:`pbs.ops.pooling.api.mean_pool`."""
    whole, last = split_tiles(x, tile)
    means = whole.mean(dim=3, dtype=torch.float32)
    if last is None:
        return means
    count = tile if pad_mean == "reference" else last.shape[2]
    total = last.sum(dim=2, keepdim=True, dtype=torch.float32)
    return torch.cat([means, total / count], dim=2)


def split_tiles(x: Tensor, tile: int) -> tuple[Tensor, Tensor | None]:
    """Whole tiles ``[Z, H, T', tile, D]`` and the tokens of a partial last one."""
    num_whole = x.shape[2] // tile
    whole = x[:, :, : num_whole * tile].unflatten(2, (num_whole, tile))
    last = x[:, :, num_whole * tile :]
    return whole, last if last.shape[2] else None


def block_logits(q_blocks: Tensor, k_blocks: Tensor) -> Tensor:
    """q kᵀ of pooled blocks, ``[Z, Hq, Tq, Tk]`` from ``[Z, Hq, Tq, D]`` and ``[Z, Ho, Tk, D]``."""
    groups = q_blocks.shape[1] // k_blocks.shape[1]
    grouped = q_blocks.unflatten(1, (k_blocks.shape[1], groups))
    return (grouped @ k_blocks.unsqueeze(2).transpose(-1, -2)).flatten(1, 2)


def softmax_over(logits: Tensor, candidates: Tensor) -> Tensor:
    """fp32 softmax over the candidates of each row; 0 elsewhere and in rows without candidates."""
    logits = logits.float().masked_fill(~candidates, float("-inf"))
    return logits.softmax(dim=-1).masked_fill(~candidates, 0.0)

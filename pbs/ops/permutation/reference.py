"""Eager PyTorch. Legend: see :mod:`pbs.ops.grid`; P proxy queries, G heads of a group."""

from __future__ import annotations

import torch
from torch import Tensor

from pbs.ops.pooling import mean_pool

# Scores held at once: 2^25 fp32 values are 128 MB, and as much again for their softmax.
MAX_SCORES = 1 << 25


def key_importance(proxy: Tensor, k: Tensor, *, scale: float) -> Tensor:
    """One key/value head and ``MAX_SCORES`` scores at a time."""
    batch, num_kv_heads, num_keys, _ = k.shape
    groups = proxy.shape[1] // num_kv_heads
    # [Z, Hkv, P, G, D]: a chunk of proxy queries has all heads of the group.
    proxy = proxy.unflatten(1, (num_kv_heads, groups)).transpose(2, 3)
    chunk = max(1, MAX_SCORES // (batch * groups * num_keys))
    scores = []
    for head in range(num_kv_heads):
        keys = k[:, head].float().transpose(-1, -2)  # [Z, D, N]
        total = torch.zeros(batch, groups, num_keys, device=k.device)
        for queries in proxy[:, head].split(chunk, dim=1):
            logits = (queries.flatten(1, 2).float() @ keys).mul_(scale)
            total += logits.softmax(dim=-1).unflatten(1, (-1, groups)).sum(dim=1)
        scores.append(total / proxy.shape[2])
    return torch.cat(scores, dim=1)


def sort_segments(scores: Tensor, *, num_keys: int, segment_size: int) -> Tensor:
    """A stable sort of each segment."""
    segments = scores.unflatten(-1, (-1, segment_size))
    local = segments.argsort(dim=-1, descending=True, stable=True)
    starts = torch.arange(segments.shape[2], device=scores.device) * segment_size
    order = (local + starts[:, None]).flatten(-2)
    tail = torch.arange(order.shape[-1], num_keys, device=scores.device)
    return torch.cat([order, tail.expand(*order.shape[:2], -1)], dim=-1)


def importance_order(proxy: Tensor, k: Tensor, *, scale: float, segment_size: int) -> Tensor:
    """Scores of all keys of complete segments, then a sort."""
    num_keys = k.shape[2]
    num_sorted = num_keys // segment_size * segment_size
    scores = key_importance(proxy, k[:, :, :num_sorted], scale=scale)
    return sort_segments(scores, num_keys=num_keys, segment_size=segment_size)


def gather_and_pool(x: Tensor, order: Tensor, *, tile: int, pad_mean: str) -> tuple[Tensor, Tensor]:
    """A gather, then means."""
    gathered = gather_keys(x, order)
    return gathered, mean_pool(gathered, tile, pad_mean=pad_mean)


def gather_keys(x: Tensor, order: Tensor) -> Tensor:
    """``torch.gather`` over a view in which the heads of a group share memory."""
    groups = order.shape[1] // x.shape[1]
    repeated = x.unsqueeze(2).expand(-1, -1, groups, -1, -1)
    index = order.unflatten(1, (x.shape[1], groups)).unsqueeze(-1).expand_as(repeated)
    return repeated.gather(3, index).flatten(1, 2)

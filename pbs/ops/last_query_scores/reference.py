"""Eager PyTorch, some heads at a time. Legend: see :mod:`pbs.ops.grid`; L last queries."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Probabilities held at once: 8 MB.
MAX_ELEMENTS = 1 << 21


def last_query_scores(q: Tensor, k: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """See :func:`pbs.ops.last_query_scores.api.last_query_scores`; q holds the last queries."""
    batch, kv_heads, num_keys, _ = k.shape
    groups, last_q = q.shape[1] // kv_heads, q.shape[2]
    queries = q.unflatten(1, (kv_heads, groups))
    keys = torch.arange(num_keys, device=q.device)
    future = keys > keys[num_keys - last_q :, None]  # [L, Nk]
    shape = (batch, kv_heads, groups, num_keys)
    vertical = torch.empty(shape, dtype=torch.float32, device=q.device)
    slash = torch.empty_like(vertical)
    chunk = max(1, MAX_ELEMENTS // (last_q * num_keys))
    for sequence in range(batch):
        for heads in _chunks(kv_heads, max(1, chunk // groups)):
            transposed = k[sequence, heads].float().transpose(-1, -2).unsqueeze(1)
            for members in _chunks(groups, chunk):
                logits = queries[sequence, heads, members].float() @ transposed * scale
                probabilities = logits.masked_fill_(future, float("-inf")).softmax(dim=-1)
                vertical[sequence, heads, members] = probabilities.sum(dim=-2)
                padded = torch.nn.functional.pad(probabilities, (last_q - 1, 0))
                slash[sequence, heads, members] = sum_by_offset(padded, num_keys)
    return vertical.flatten(1, 2), slash.flatten(1, 2)


def sum_by_offset(padded: Tensor, num_keys: int) -> Tensor:
    """Sums along the diagonals by offset ``[.., N]``; rows are the last L queries.

    ``padded`` is ``[.., L, N + L - 1]``, contiguous, with L - 1 zeros before the first key.
    """
    # One element further in each row: a diagonal becomes a column.
    strides = (*padded.stride()[:-2], padded.shape[-1] + 1, 1)
    diagonals = padded.as_strided((*padded.shape[:-1], num_keys), strides)
    return diagonals.sum(dim=-2).flip(-1)


def _chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` that together are ``range(count)``."""
    for begin in range(0, count, size):
        yield slice(begin, begin + size)

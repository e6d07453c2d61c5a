"""Dense causal attention through PyTorch's SDPA, bottom-right aligned, never with an N x N mask.

Legend: see :mod:`pbs.ops.grid`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

# Query rows per chunk where a mask must be written out: 512 x 128K booleans are 64 MB.
CHUNK_ROWS = 512


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(q kᵀ scale) v, causal and aligned bottom-right; options of special layers.

    Args:
        q: ``[Z, Hq, Nq, D]``.
        k: ``[Z, Hkv, Nk, D]``, Nk >= Nq, Hq a multiple of Hkv.
        v: ``[Z, Hkv, Nk, D]``.
        scale: factor of the logits.
        sliding_window: a query sees only the last this many keys, itself included.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        sinks: per-head logit that takes part in the softmax without a value, ``[Hq]``.

    Returns:
        ``[Z, Hq, Nq, D]`` in q's dtype.
    """
    num_queries, num_keys = q.shape[2], k.shape[2]
    if sliding_window is not None and sliding_window >= num_keys:
        sliding_window = None
    if softcap is None and sinks is None and sliding_window is None:
        if num_queries == 1:
            return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
        if num_queries == num_keys:
            return scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=True
            )
        if q.is_cuda:
            bias = causal_lower_right(num_queries, num_keys)
            return scaled_dot_product_attention(
                q, k, v, attn_mask=bias, scale=scale, enable_gqa=True
            )
    return _chunked_attention(
        q, k, v, scale=scale, sliding_window=sliding_window, softcap=softcap, sinks=sinks
    )


def _chunked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Query chunk by query chunk, over only the keys the chunk can see."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    offset = num_keys - num_queries
    outputs = []
    for start in range(0, num_queries, CHUNK_ROWS):
        rows = q[:, :, start : start + CHUNK_ROWS]
        first, last = offset + start, offset + start + rows.shape[2]
        begin = 0 if sliding_window is None else max(0, first - sliding_window + 1)
        positions = torch.arange(first, last, device=q.device)[:, None]
        keys = torch.arange(begin, last, device=q.device)[None, :]
        mask = keys <= positions
        if sliding_window is not None:
            mask &= positions - keys < sliding_window
        k_part, v_part = k[:, :, begin:last], v[:, :, begin:last]
        if softcap is None and sinks is None:
            out = scaled_dot_product_attention(
                rows, k_part, v_part, attn_mask=mask, scale=scale, enable_gqa=True
            )
        else:
            out = _softcapped(rows, k_part, v_part, mask, scale, softcap, sinks)
        outputs.append(out)
    return torch.cat(outputs, dim=2)


def _softcapped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Eager attention in fp32 with the options SDPA does not have."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    logits = q.float() @ k.float().transpose(-1, -2) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.float()[None, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, column], dim=-1)
    probabilities = logits.softmax(dim=-1)[..., : k.shape[2]]
    return (probabilities @ v.float()).to(q.dtype)

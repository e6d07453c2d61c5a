"""Dense causal attention through PyTorch's SDPA, bottom-right aligned, never with an N x N mask.

Legend: see :mod:`pbs.ops.grid`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Query rows per chunk where a mask must be written out: 512 x 128K booleans are 64 MB.
CHUNK_ROWS = 512
# fp32 logits per chunk where SDPA cannot be used: 64 M are 256 MB.
CHUNK_LOGITS = 1 << 26


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
            # Imported here: it loads torch's compiler, which `import pbs` must not.
            from torch.nn.attention.bias import causal_lower_right

            bias = causal_lower_right(num_queries, num_keys)
            return scaled_dot_product_attention(
                q, k, v, attn_mask=bias, scale=scale, enable_gqa=True
            )
    return _chunked_attention(
        q, k, v, scale=scale, sliding_window=sliding_window, softcap=softcap, sinks=sinks
    )


def dense_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    visible: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one query per sequence over the visible keys: a decoding step.

    Args:
        q: ``[Z, Hq, 1, D]``.
        k: ``[Z, Hkv, Nk, D]``, Hq a multiple of Hkv.
        v: ``[Z, Hkv, Nk, D]``.
        scale: factor of the logits.
        visible: keys the query may see, bool ``[Z, Nk]``; None: all.
        softcap: see :func:`dense_attention`.
        sinks: see :func:`dense_attention`.

    Returns:
        ``[Z, Hq, 1, D]`` in q's dtype.
    """
    mask = None if visible is None else visible[:, None, None, :]
    if softcap is not None or sinks is not None:
        return _softcapped(q, k, v, mask, scale, softcap, sinks)
    # Heads of one group as query rows: SDPA then needs no GQA flag, which together with a mask
    # would send it to its slowest kernel.
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    out = scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
    return out.reshape(q.shape)


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
    chunk_rows = CHUNK_ROWS
    if softcap is not None or sinks is not None:
        width = num_keys if sliding_window is None else min(num_keys, sliding_window + CHUNK_ROWS)
        chunk_rows = max(1, min(CHUNK_ROWS, CHUNK_LOGITS // (q.shape[0] * q.shape[1] * width)))
    outputs = []
    for start in range(0, num_queries, chunk_rows):
        rows = q[:, :, start : start + chunk_rows]
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
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Eager fp32 attention with the options SDPA lacks; mask bool ``[.., .., M, Nk]``."""
    heads = (k.shape[1], q.shape[1] // k.shape[1])
    # [Z, Hkv, G, M, D] x [Z, Hkv, 1, D, Nk]: keys and values are not repeated.
    logits = q.unflatten(1, heads).float() @ k.unsqueeze(2).float().transpose(-1, -2) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        mask = mask.unsqueeze(2) if mask.ndim == 4 else mask
        logits = logits.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.float().reshape(1, *heads, 1, 1).expand(*logits.shape[:4], 1)
        logits = torch.cat([logits, column], dim=-1)
    probabilities = logits.softmax(dim=-1)[..., : k.shape[2]]
    return (probabilities @ v.unsqueeze(2).float()).flatten(1, 2).to(q.dtype)

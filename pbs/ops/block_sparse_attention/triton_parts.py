"""What the Triton kernel of :mod:`.triton` is made of.

Legend: see :mod:`pbs.ops.grid`. In the kernel: M query rows, N keys, D head dim (padded to a power
of two).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def offset(strides, batch, head):
    """First element of a (sequence, head) pair; int64, since N times a stride can pass 2^31."""
    return batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def load_rows(base, rows, stride, keep, dims, HEAD_DIM: tl.constexpr):
    """Rows of a [N, D] matrix wherever they lie; 0 for rows not kept and dims past the head dim."""
    pointers = base + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    return tl.load(pointers, mask=keep[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def load_tile(
    descriptor,
    base,
    plane,
    start,
    stride,
    num_keys,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """BLOCK_N consecutive rows from ``start`` of one head's keys or values; 0 past the last key."""
    if USE_TMA:
        return descriptor.load([plane, start, 0]).reshape([BLOCK_N, BLOCK_D])
    rows = start + tl.arange(0, BLOCK_N)
    return load_rows(base, rows, stride, rows < num_keys, tl.arange(0, BLOCK_D), HEAD_DIM)


@triton.jit
def weigh(row_max, row_sum, q, k, seen, scale_log2, MASKED: tl.constexpr):
    """Weights of a tile of keys, maximum and sum so far; ``seen`` is read only if MASKED."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee")  # [M, N]
    if MASKED:
        logits = tl.where(seen, logits, float("-inf"))
    # scale_log2 is positive: the scaled maximum is the maximum scaled, and the subtraction below
    # becomes one fused multiply-add per logit.
    new_max = tl.maximum(row_max, tl.max(logits, 1) * scale_log2)
    reference = new_max
    if MASKED:
        # A row that has seen no key yet has maximum -inf; -inf - -inf would be NaN.
        reference = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(logits * scale_log2 - reference[:, None])  # [M, N]
    decay = tl.exp2(row_max - reference)
    return weights, decay, new_max, row_sum * decay + tl.sum(weights, 1)


@triton.jit
def online_softmax(acc, row_max, row_sum, q, k, v, seen, scale_log2, MASKED: tl.constexpr):
    """Fold one tile of keys into the running softmax."""
    weights, decay, row_max, row_sum = weigh(row_max, row_sum, q, k, seen, scale_log2, MASKED)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")  # [M, D]
    return acc, row_max, row_sum


@triton.jit
def sees(positions, keys, num_init, num_local, HAS_LOCAL_WINDOW: tl.constexpr):
    """Causality and the token rule inside windows, broadcast over positions and keys."""
    seen = keys <= positions
    if HAS_LOCAL_WINDOW:
        seen = seen & ((keys < num_init) | (positions - keys < num_local))
    return seen


@triton.jit
def attend_windows_by_value(
    q,
    k_base,
    v_base,
    k_stride,
    v_stride,
    windows,
    count,
    positions,
    num_keys,
    num_init,
    num_local,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEY_TILE: tl.constexpr,
    HAS_LOCAL_WINDOW: tl.constexpr,
):
    """Windows once more, value by value, each added only to the rows that see it.

    Slow: for the tiles in which a value is not finite.
    """
    BLOCK_M: tl.constexpr = q.shape[0]
    BLOCK_D: tl.constexpr = q.shape[1]
    PARTS: tl.constexpr = KEY_TILE // BLOCK_N
    dims = tl.arange(0, BLOCK_D)
    places = tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    for step in range(count * PARTS):
        start = tl.load(windows + step // PARTS) + step % PARTS * BLOCK_N
        keys = start + places
        k = load_rows(k_base, keys, k_stride, keys < num_keys, dims, HEAD_DIM)  # [N, D]
        seen = sees(positions[:, None], keys[None, :], num_init, num_local, HAS_LOCAL_WINDOW)
        weights, decay, row_max, row_sum = weigh(row_max, row_sum, q, k, seen, scale_log2, True)
        acc = acc * decay[:, None]
        for place in range(BLOCK_N):
            key = start + place
            keep = (dims < HEAD_DIM) & (key < num_keys)
            v = tl.load(v_base + key.to(tl.int64) * v_stride + dims, mask=keep, other=0.0)  # [D]
            weight = tl.sum(tl.where(places == place, weights, 0.0), 1)  # [M]
            weight = weight.to(v.dtype).to(tl.float32)  # as in the product
            added = weight[:, None] * v.to(tl.float32)[None, :]
            takes_part = sees(positions, key, num_init, num_local, HAS_LOCAL_WINDOW)
            acc += tl.where(takes_part[:, None], added, 0.0)
    return acc, row_max, row_sum

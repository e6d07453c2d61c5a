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
def online_softmax(acc, row_max, row_sum, q, k, v, seen, scale_log2, MASKED: tl.constexpr):
    """Fold one tile of keys into the running softmax; ``seen`` is read only if MASKED."""
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
    row_sum = row_sum * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")  # [M, D]
    return acc, new_max, row_sum

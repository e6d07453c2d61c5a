"""What several Triton kernels need: addresses, row loads, the running softmax.

Legend: see :mod:`pbs.ops.grid`. Here: M rows of queries, N rows of keys, D head dim (padded to a
power of two).
"""

from __future__ import annotations

import triton
import triton.language as tl

# exp(x) = exp2(x LOG2_E): the hardware has exp2.
LOG2_E = 1.4426950408889634


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
def fold(row_max, row_sum, logits, scale_log2, CAN_BE_EMPTY: tl.constexpr):
    """Fold logits [M, N] into the running maximum and sum of a softmax.

    Returns:
        Weights [M, N], what earlier weights are multiplied by [M], the new maximum and sum [M].
    """
    # scale_log2 is positive: the scaled maximum is the maximum scaled, and the subtraction below
    # becomes one fused multiply-add per logit.
    new_max = tl.maximum(row_max, tl.max(logits, 1) * scale_log2)
    reference = new_max
    if CAN_BE_EMPTY:
        # A row that has seen no key yet has maximum -inf; -inf - -inf would be NaN.
        reference = finite(new_max)
    weights = tl.exp2(logits * scale_log2 - reference[:, None])
    decay = tl.exp2(row_max - reference)
    return weights, decay, new_max, row_sum * decay + tl.sum(weights, 1)


@triton.jit
def finite(row_max):
    """A maximum to subtract: 0 for rows without any key."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)

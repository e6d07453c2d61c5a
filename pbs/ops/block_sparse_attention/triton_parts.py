"""What the Triton kernel of :mod:`.triton` is made of.

Legend: see :mod:`pbs.ops.grid`. In the kernel: M query rows, N keys, D head dim (padded to a power
of two).
"""

from __future__ import annotations

import triton
import triton.language as tl

from pbs.ops.primitives import fold, load_rows, offset


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
):
    """BLOCK_N consecutive rows from ``start`` of one head's keys or values; 0 past the last key."""
    if descriptor is not None:
        return descriptor.load([plane, start, 0]).reshape([BLOCK_N, BLOCK_D])
    rows = start + tl.arange(0, BLOCK_N)
    return load_rows(base, rows, stride, rows < num_keys, tl.arange(0, BLOCK_D), HEAD_DIM)


@triton.jit
def list_of(entries, batch, head, tile):
    """Where the list of a query tile begins, and how many entries it has.

    Args:
        entries: lists, their lengths, and the strides of both.
    """
    lists, counts, strides, count_strides = entries
    place = counts + offset(count_strides, batch, head) + tile * count_strides[2]
    return lists + offset(strides, batch, head) + tile * strides[2], tl.load(place)


@triton.jit
def weigh(row_max, row_sum, q, k, seen, scale_log2, MASKED: tl.constexpr):
    """Weights of a tile of keys, maximum and sum so far; ``seen`` is read only if MASKED."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee")  # [M, N]
    if MASKED:
        logits = tl.where(seen, logits, float("-inf"))
    return fold(row_max, row_sum, logits, scale_log2, MASKED)


@triton.jit
def attend(state, q, k, v, seen, scale_log2, MASKED: tl.constexpr):
    """Fold one tile of keys and values into (accumulator, maximum, sum) of the rows."""
    acc, row_max, row_sum = state
    weights, decay, row_max, row_sum = weigh(row_max, row_sum, q, k, seen, scale_log2, MASKED)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")  # [M, D]
    return acc, row_max, row_sum


@triton.jit
def head_of(keys, batch, head):
    """Where one head's keys and values begin, the strides of their rows, and its plane."""
    k_ptr, v_ptr, k_strides, v_strides, num_heads = keys
    k_base = k_ptr + offset(k_strides, batch, head)
    v_base = v_ptr + offset(v_strides, batch, head)
    return k_base, v_base, k_strides[2], v_strides[2], batch * num_heads + head


@triton.jit
def attend_tile(
    state,
    q,
    head,
    descriptors,
    start,
    num_keys,
    seen,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Fold BLOCK_N consecutive keys of a head (:func:`head_of`) into the state of the rows."""
    k_base, v_base, k_stride, v_stride, plane = head
    D: tl.constexpr = q.shape[1]
    k = load_tile(descriptors[0], k_base, plane, start, k_stride, num_keys, HEAD_DIM, BLOCK_N, D)
    v = load_tile(descriptors[1], v_base, plane, start, v_stride, num_keys, HEAD_DIM, BLOCK_N, D)
    return attend(state, q, k, v, seen, scale_log2, MASKED)


@triton.jit
def sees(positions, keys, local_window):
    """Causality and the token rule inside windows, broadcast over positions and keys.

    Args:
        local_window: how many first and how many nearest keys a row sees; None: all.
    """
    seen = keys <= positions
    if local_window is not None:
        seen = seen & ((keys < local_window[0]) | (positions - keys < local_window[1]))
    return seen


@triton.jit
def attend_windows_by_value(
    q,
    natural_head,
    windows,
    count,
    positions,
    num_keys,
    local_window,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEY_TILE: tl.constexpr,
):
    """Windows once more, value by value, each added only to the rows that see it.

    Slow: for the tiles in which a value is not finite.
    """
    k_base, v_base, k_stride, v_stride, _ = natural_head
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
        seen = sees(positions[:, None], keys[None, :], local_window)
        weights, decay, row_max, row_sum = weigh(row_max, row_sum, q, k, seen, scale_log2, True)
        acc = acc * decay[:, None]
        for place in range(BLOCK_N):
            key = start + place
            keep = (dims < HEAD_DIM) & (key < num_keys)
            v = tl.load(v_base + key.to(tl.int64) * v_stride + dims, mask=keep, other=0.0)  # [D]
            weight = tl.sum(tl.where(places == place, weights, 0.0), 1)  # [M]
            weight = weight.to(v.dtype).to(tl.float32)  # as in the product
            added = weight[:, None] * v.to(tl.float32)[None, :]
            takes_part = sees(positions, key, local_window)
            acc += tl.where(takes_part[:, None], added, 0.0)
    return acc, row_max, row_sum

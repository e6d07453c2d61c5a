"""Triton kernels: scores without writing logits, places within segments by counting, row gathers.

Legend: see :mod:`pbs.ops.grid`; P proxy queries, S segment. In the kernels: M proxy rows, N keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pbs.ops.primitives import LOG2_E, finite, fold, load_rows, offset

# Parts of the keys that programs of the first pass reduce to a maximum and a sum per proxy query:
# enough to fill a GPU, few enough that every program of the second pass can combine them itself.
MAX_CHUNKS = 32
# Programs of the first pass that fill a GPU.
NUM_PROGRAMS = 256


@triton.jit
def _logits(q, k, rows, num_keys, scale_log2):
    """Base-2 logits of some keys; -inf past the last key."""
    if q.dtype == k.dtype:
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")  # [M, N]
    else:
        # A mean of queries has more bits than one: two products of 16-bit factors, which the matrix
        # unit multiplies, instead of one in fp32, which it does not.
        high = q.to(k.dtype)
        low = (q - high.to(tl.float32)).to(k.dtype)
        logits = tl.dot(high, tl.trans(k), input_precision="ieee")  # [M, N]
        logits = tl.dot(low, tl.trans(k), logits, input_precision="ieee")
    logits *= scale_log2
    return tl.where((rows < num_keys)[None, :], logits, float("-inf"))


@triton.jit
def proxy_normaliser_kernel(
    q_ptr,
    k_ptr,
    maxima_ptr,
    sums_ptr,
    q_strides,
    k_strides,
    scale_log2,
    num_heads,
    num_keys,
    num_proxy,
    num_chunks,
    chunk_size,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: maximum and sum of exponentials of BLOCK_M proxy queries over a chunk."""
    chunk = tl.program_id(0)
    batch = tl.program_id(1) // num_heads
    head = tl.program_id(1) % num_heads
    proxy = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    q_base = q_ptr + offset(q_strides, batch, head)
    q = load_rows(q_base, proxy, q_strides[2], proxy < num_proxy, dims, HEAD_DIM)  # [M, D]
    k_base = k_ptr + offset(k_strides, batch, head // GROUP)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    for start in range(0, chunk_size, BLOCK_N):
        rows = chunk * chunk_size + start + tl.arange(0, BLOCK_N)
        k = load_rows(k_base, rows, k_strides[2], rows < num_keys, dims, HEAD_DIM)  # [N, D]
        logits = _logits(q, k, rows, num_keys, scale_log2)
        # The first tile of a chunk always has a key: the maximum is finite.
        _, _, row_max, row_sum = fold(row_max, row_sum, logits, 1.0, False)
    places = (tl.program_id(1).to(tl.int64) * num_chunks + chunk) * num_proxy + proxy
    tl.store(maxima_ptr + places, row_max, mask=proxy < num_proxy)
    tl.store(sums_ptr + places, row_sum, mask=proxy < num_proxy)


@triton.jit
def _normalisers(maxima_ptr, sums_ptr, plane, proxy, num_proxy, num_chunks, BLOCK_C: tl.constexpr):
    """Base-2 logarithm of the sum over all keys, [M]; +inf for rows that do not exist."""
    chunks = tl.arange(0, BLOCK_C)
    places = (plane * num_chunks + chunks)[:, None] * num_proxy + proxy[None, :]
    exists = (chunks < num_chunks)[:, None] & (proxy < num_proxy)[None, :]
    maxima = tl.load(maxima_ptr + places, mask=exists, other=float("-inf"))  # [C, M]
    sums = tl.load(sums_ptr + places, mask=exists, other=0.0)
    reference = finite(tl.max(maxima, 0))
    total = tl.sum(sums * tl.exp2(maxima - reference[None, :]), 0)
    # A probability of a row that does not exist is exp2(... - inf) = 0.
    return tl.where(proxy < num_proxy, reference + tl.log2(tl.maximum(total, 1e-37)), float("inf"))


@triton.jit
def key_importance_kernel(
    q_ptr,
    k_ptr,
    maxima_ptr,
    sums_ptr,
    scores_ptr,
    q_strides,
    k_strides,
    scale_log2,
    num_heads,
    num_keys,
    num_proxy,
    num_chunks,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: the mean probability of BLOCK_N keys of one head over all proxy queries."""
    plane = tl.program_id(1)
    batch = plane // num_heads
    head = plane % num_heads
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    q_base = q_ptr + offset(q_strides, batch, head)
    k_base = k_ptr + offset(k_strides, batch, head // GROUP)
    k = load_rows(k_base, rows, k_strides[2], rows < num_keys, dims, HEAD_DIM)  # [N, D]
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in range(0, num_proxy, BLOCK_M):
        proxy = start + tl.arange(0, BLOCK_M)
        q = load_rows(q_base, proxy, q_strides[2], proxy < num_proxy, dims, HEAD_DIM)  # [M, D]
        logits = _logits(q, k, rows, num_keys, scale_log2)
        normaliser = _normalisers(
            maxima_ptr, sums_ptr, plane.to(tl.int64), proxy, num_proxy, num_chunks, BLOCK_C
        )
        total += tl.sum(tl.exp2(logits - normaliser[:, None]), 0)
    places = plane.to(tl.int64) * num_keys + rows
    tl.store(scores_ptr + places, total / num_proxy, mask=rows < num_keys)


@triton.jit
def _sort_keys(scores, inside, local, BLOCK_S: tl.constexpr):
    """Integers that are all different and ordered like the scores, ties by lower place first."""
    # Scores are not negative, so their bits are ordered like them; what is not inside comes last.
    bits = tl.where(inside, scores.to(tl.int32, bitcast=True).to(tl.int64), -1)
    return bits * BLOCK_S + (BLOCK_S - 1 - local)


@triton.jit
def _num_larger(keys, others):
    """How many of the others are larger than each key.

    Counting compares every pair, yet for segments of a few hundred keys it beats a sorting network:
    its stages exchange values between threads, the comparisons of a pair need none.
    """
    # The others along the first axis: a thread then holds many of one column and adds them alone.
    return tl.sum((others[:, None] > keys[None, :]).to(tl.int32), 0)


@triton.jit
def sort_segments_kernel(
    scores_ptr,
    order_ptr,
    num_scores,
    num_keys,
    SEGMENT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: the places of BLOCK_N keys among all of their segment."""
    PARTS: tl.constexpr = (SEGMENT + BLOCK_N - 1) // BLOCK_N
    head = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) // PARTS * SEGMENT
    scores_ptr += head * num_scores + first
    local = tl.program_id(0) % PARTS * BLOCK_N + tl.arange(0, BLOCK_N)
    scores = tl.load(scores_ptr + local, mask=local < SEGMENT, other=0.0)
    keys = _sort_keys(scores, local < SEGMENT, local, BLOCK_S)
    rank = tl.zeros([BLOCK_N], dtype=tl.int32)
    for start in range(0, SEGMENT, BLOCK_N):
        others = start + tl.arange(0, BLOCK_N)
        scores = tl.load(scores_ptr + others, mask=others < SEGMENT, other=0.0)
        rank += _num_larger(keys, _sort_keys(scores, others < SEGMENT, others, BLOCK_S))
    places = head * num_keys + first + rank
    tl.store(order_ptr + places, (first + local).to(tl.int64), mask=local < SEGMENT)


@triton.jit
def gather_keys_kernel(
    x_ptr,
    order_ptr,
    out_ptr,
    means_ptr,
    x_strides,
    num_heads,
    num_keys,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
    HAS_MEANS: tl.constexpr,
    COUNTS_PADDING: tl.constexpr,
):
    """One program: TILE rows of one head, and their mean if asked for."""
    plane = tl.program_id(1).to(tl.int64)
    batch = plane // num_heads
    head = plane % num_heads
    dims = tl.arange(0, BLOCK_D)
    base = plane * num_keys
    x_base = x_ptr + batch * x_strides[0] + head // GROUP * x_strides[1]
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(0, TILE, BLOCK_N):
        places = tl.program_id(0) * TILE + start + tl.arange(0, BLOCK_N)
        exists = places < num_keys
        source = tl.load(order_ptr + base + places, mask=exists, other=0)
        keep = exists[:, None] & (dims < HEAD_DIM)[None, :]
        rows = load_rows(x_base, source, x_strides[2], exists, dims, HEAD_DIM)  # [N, D]
        out = out_ptr + (base + places)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out, rows, mask=keep)
        if HAS_MEANS:
            total += tl.sum(rows.to(tl.float32), 0)
    if HAS_MEANS:
        count = TILE
        if not COUNTS_PADDING:
            count = tl.minimum(TILE, num_keys - tl.program_id(0) * TILE)
        place = (plane * tl.num_programs(0) + tl.program_id(0)) * HEAD_DIM
        tl.store(means_ptr + place + dims, total / count, mask=dims < HEAD_DIM)


def key_importance(proxy: Tensor, k: Tensor, *, scale: float) -> Tensor:
    """Two passes over the keys: maxima and sums of the proxy queries, then means per key."""
    proxy, k = (x if x.stride(3) == 1 else x.contiguous() for x in (proxy, k))
    batch, num_heads, num_proxy, head_dim = proxy.shape
    num_keys = k.shape[2]
    planes = batch * num_heads
    block_d = triton.next_power_of_2(max(head_dim, 16))
    is_wide = block_d * k.element_size() > 256
    block_m = min(64 if is_wide else 128, triton.next_power_of_2(max(num_proxy, 16)))
    block_n = 64 if is_wide else 128
    tiles = triton.cdiv(num_keys, block_n)
    chunk_size = triton.cdiv(tiles, min(MAX_CHUNKS, max(4, NUM_PROGRAMS // planes))) * block_n
    num_chunks = triton.cdiv(num_keys, chunk_size)
    maxima = proxy.new_empty(planes, num_chunks, num_proxy, dtype=torch.float32)
    sums = torch.empty_like(maxima)
    scores = proxy.new_empty(batch, num_heads, num_keys, dtype=torch.float32)
    sizes = (scale * LOG2_E, num_heads, num_keys, num_proxy, num_chunks)
    strides = (proxy.stride(), k.stride())
    options = {
        "GROUP": num_heads // k.shape[1],
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_N": block_n,
        "num_stages": 2,  # two programs an SM
    }
    # All proxy queries at once, where they fit: the keys are then read once.
    proxy_normaliser_kernel[(num_chunks, planes, triton.cdiv(num_proxy, block_m))](
        proxy,
        k,
        maxima,
        sums,
        *strides,
        *sizes,
        chunk_size,
        **options,
        BLOCK_M=block_m,
        num_warps=8 if block_m == 128 else 4,
    )
    key_importance_kernel[(tiles, planes)](
        proxy,
        k,
        maxima,
        sums,
        scores,
        *strides,
        *sizes,
        **options,
        BLOCK_M=min(64, block_m),
        BLOCK_C=triton.next_power_of_2(num_chunks),
    )
    return scores


def importance_order(proxy: Tensor, k: Tensor, *, scale: float, segment_size: int) -> Tensor:
    """Scores, then places; writing 4 bytes a key between them costs less than sharing a program."""
    num_keys = k.shape[2]
    num_sorted = num_keys // segment_size * segment_size
    scores = key_importance(proxy, k[:, :, :num_sorted], scale=scale)
    return sort_segments(scores, num_keys=num_keys, segment_size=segment_size)


def sort_segments(scores: Tensor, *, num_keys: int, segment_size: int) -> Tensor:
    """Every key counts the larger ones of its segment."""
    scores = scores.contiguous()
    batch, num_heads, num_scores = scores.shape
    order = torch.empty(batch, num_heads, num_keys, dtype=torch.int64, device=scores.device)
    if num_scores < num_keys:
        order[..., num_scores:] = torch.arange(num_scores, num_keys, device=scores.device)
    block_s = triton.next_power_of_2(segment_size)
    block_n = min(64, block_s)
    num_parts = num_scores // segment_size * triton.cdiv(segment_size, block_n)
    sort_segments_kernel[(num_parts, batch * num_heads)](
        scores,
        order,
        num_scores,
        num_keys,
        SEGMENT=segment_size,
        BLOCK_S=block_s,
        BLOCK_N=block_n,
    )
    return order


def gather_keys(x: Tensor, order: Tensor) -> Tensor:
    """Row by row; the heads of a group read the same memory."""
    return _gather(x, order, tile=None, pad_mean="real")[0]


def gather_and_pool(x: Tensor, order: Tensor, *, tile: int, pad_mean: str) -> tuple[Tensor, Tensor]:
    """As the rows of a tile pass through registers, they are added up."""
    return _gather(x, order, tile=tile, pad_mean=pad_mean)


def _gather(x: Tensor, order: Tensor, *, tile: int | None, pad_mean: str) -> tuple[Tensor, Tensor]:
    """The rows, and their means if there is a tile (else the rows again)."""
    x = x if x.stride(3) == 1 else x.contiguous()
    order = order.contiguous()
    batch, num_heads, num_keys = order.shape
    head_dim = x.shape[3]
    out = x.new_empty(batch, num_heads, num_keys, head_dim)
    rows = tile or 64
    num_tiles = triton.cdiv(num_keys, rows)
    means = out
    if tile is not None:
        means = x.new_empty(batch, num_heads, num_tiles, head_dim, dtype=torch.float32)
    gather_keys_kernel[(num_tiles, batch * num_heads)](
        x,
        order,
        out,
        means,
        x.stride(),
        num_heads,
        num_keys,
        GROUP=num_heads // x.shape[1],
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_N=min(rows, 64),
        TILE=rows,
        HAS_MEANS=tile is not None,
        COUNTS_PADDING=pad_mean == "reference",
    )
    return out, means

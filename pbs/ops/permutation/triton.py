"""Triton kernels: scores without writing logits, a sort per segment in registers, row gathers.

Legend: see :mod:`pbs.ops.grid`; P proxy queries, S segment. In the kernels: M proxy rows, N keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
# Parts of the keys that programs of the first pass reduce to a maximum and a sum per proxy query:
# enough to fill a GPU, few enough that every program of the second pass can combine them itself.
MAX_CHUNKS = 32
# A segment whose keys one program scores and sorts: what its registers and shared memory hold.
MAX_FUSED_SEGMENT = 256
MAX_FUSED_BYTES = 1 << 16


@triton.jit
def _logits(q, k_base, rows, k_stride, dims, num_keys, scale_log2, HEAD_DIM: tl.constexpr):
    """Base-2 logits of some keys; -inf past the last key."""
    keep = (rows < num_keys)[:, None] & (dims < HEAD_DIM)[None, :]
    pointers = k_base + rows.to(tl.int64)[:, None] * k_stride + dims[None, :]
    k = tl.load(pointers, mask=keep, other=0.0)  # [N, D]
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2  # [M, N]
    return tl.where((rows < num_keys)[None, :], logits, float("-inf"))


@triton.jit
def _load_proxy(q_ptr, strides, batch, head, rows, dims, num_proxy, HEAD_DIM: tl.constexpr):
    base = q_ptr + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    keep = (rows < num_proxy)[:, None] & (dims < HEAD_DIM)[None, :]
    pointers = base + rows[:, None] * strides[2] + dims[None, :]
    return tl.load(pointers, mask=keep, other=0.0)  # [M, D]


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
    q = _load_proxy(q_ptr, q_strides, batch, head, proxy, dims, num_proxy, HEAD_DIM)
    k_base = k_ptr + batch.to(tl.int64) * k_strides[0] + (head // GROUP).to(tl.int64) * k_strides[1]
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    for start in range(0, chunk_size, BLOCK_N):
        rows = chunk * chunk_size + start + tl.arange(0, BLOCK_N)
        logits = _logits(q, k_base, rows, k_strides[2], dims, num_keys, scale_log2, HEAD_DIM)
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        # The first tile of a chunk always has a key: new_max is finite.
        row_sum = row_sum * tl.exp2(row_max - new_max)
        row_sum += tl.sum(tl.exp2(logits - new_max[:, None]), 1)
        row_max = new_max
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
    largest = tl.max(maxima, 0)
    reference = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(sums * tl.exp2(maxima - reference[None, :]), 0)
    # A probability of a row that does not exist is exp2(... - inf) = 0.
    return tl.where(proxy < num_proxy, reference + tl.log2(tl.maximum(total, 1e-37)), float("inf"))


@triton.jit
def _importance(
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
    rows,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean probability of BLOCK_N keys over all proxy queries, [N]."""
    plane = tl.program_id(1)
    batch = plane // num_heads
    head = plane % num_heads
    dims = tl.arange(0, BLOCK_D)
    k_base = k_ptr + batch.to(tl.int64) * k_strides[0] + (head // GROUP).to(tl.int64) * k_strides[1]
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in range(0, num_proxy, BLOCK_M):
        proxy = start + tl.arange(0, BLOCK_M)
        q = _load_proxy(q_ptr, q_strides, batch, head, proxy, dims, num_proxy, HEAD_DIM)
        logits = _logits(q, k_base, rows, k_strides[2], dims, num_keys, scale_log2, HEAD_DIM)
        normaliser = _normalisers(
            maxima_ptr, sums_ptr, plane.to(tl.int64), proxy, num_proxy, num_chunks, BLOCK_C
        )
        total += tl.sum(tl.exp2(logits - normaliser[:, None]), 0)
    return total / num_proxy


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
    """One program: the importance of BLOCK_N keys of one head."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    scores = _importance(
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
        rows,
        GROUP,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_M,
        BLOCK_N,
        BLOCK_C,
    )
    places = tl.program_id(1).to(tl.int64) * num_keys + rows
    tl.store(scores_ptr + places, scores, mask=rows < num_keys)


@triton.jit
def _sorted(scores, inside, local, BLOCK_S: tl.constexpr):
    """Places by descending score, ties in natural order; what is not inside comes last."""
    # Scores are not negative, so their bits are ordered like them. The index below the score makes
    # every key different and puts the lower index first.
    bits = tl.where(inside, scores.to(tl.int32, bitcast=True).to(tl.int64), -1)
    ranked = tl.sort(bits * BLOCK_S + (BLOCK_S - 1 - local), descending=True)
    return BLOCK_S - 1 - (ranked & (BLOCK_S - 1))


@triton.jit
def order_segments_kernel(
    q_ptr,
    k_ptr,
    maxima_ptr,
    sums_ptr,
    order_ptr,
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
    BLOCK_C: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program: scores and sorts one segment of one head; an incomplete one stays as it is."""
    segment = tl.program_id(0)
    local = tl.arange(0, BLOCK_S)
    rows = segment * SEGMENT + local
    inside = local < SEGMENT
    num_complete = num_keys // SEGMENT * SEGMENT
    order = rows.to(tl.int64)
    if segment * SEGMENT < num_complete:
        scores = _importance(
            q_ptr,
            k_ptr,
            maxima_ptr,
            sums_ptr,
            q_strides,
            k_strides,
            scale_log2,
            num_heads,
            num_complete,
            num_proxy,
            num_chunks,
            rows,
            GROUP,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_M,
            BLOCK_S,
            BLOCK_C,
        )
        order = segment * SEGMENT + _sorted(scores, inside, local, BLOCK_S)
    places = tl.program_id(1).to(tl.int64) * num_keys + rows
    tl.store(order_ptr + places, order, mask=inside & (rows < num_keys))


@triton.jit
def sort_segments_kernel(
    scores_ptr,
    order_ptr,
    num_scores,
    num_keys,
    SEGMENT: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program: one segment of one head."""
    segment = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    local = tl.arange(0, BLOCK_S)
    inside = local < SEGMENT
    scores = tl.load(
        scores_ptr + head * num_scores + segment * SEGMENT + local, mask=inside, other=0.0
    )
    order = segment * SEGMENT + _sorted(scores, inside, local, BLOCK_S)
    tl.store(order_ptr + head * num_keys + segment * SEGMENT + local, order, mask=inside)


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
        pointers = x_base + source[:, None] * x_strides[2] + dims[None, :]
        rows = tl.load(pointers, mask=keep, other=0.0)  # [N, D]
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
    first = _first_pass(proxy, k, k.shape[2], scale)
    batch, num_heads, _, _ = proxy.shape
    num_keys = k.shape[2]
    scores = proxy.new_empty(batch, num_heads, num_keys, dtype=torch.float32)
    block_n = first.shape["BLOCK_N"]
    key_importance_kernel[(triton.cdiv(num_keys, block_n), batch * num_heads)](
        *first.tensors,
        scores,
        *first.strides,
        *first.sizes,
        **first.shape,
        BLOCK_C=MAX_CHUNKS,
    )
    return scores


def importance_order(proxy: Tensor, k: Tensor, *, scale: float, segment_size: int) -> Tensor:
    """Scores and sorts a segment in one program; large segments are scored, then sorted."""
    num_keys = k.shape[2]
    num_sorted = num_keys // segment_size * segment_size
    row_bytes = triton.next_power_of_2(k.shape[3]) * k.element_size()
    if segment_size > MAX_FUSED_SEGMENT or segment_size * row_bytes > MAX_FUSED_BYTES:
        scores = key_importance(proxy, k[:, :, :num_sorted], scale=scale)
        return sort_segments(scores, num_keys=num_keys, segment_size=segment_size)
    first = _first_pass(proxy, k, num_sorted, scale)
    batch, num_heads, _, _ = proxy.shape
    order = torch.empty(batch, num_heads, num_keys, dtype=torch.int64, device=k.device)
    shape = {name: value for name, value in first.shape.items() if name != "BLOCK_N"}
    scale_log2, _, _, num_proxy, num_chunks = first.sizes
    order_segments_kernel[(triton.cdiv(num_keys, segment_size), batch * num_heads)](
        *first.tensors,
        order,
        *first.strides,
        scale_log2,
        num_heads,
        num_keys,
        num_proxy,
        num_chunks,
        **shape,
        BLOCK_C=MAX_CHUNKS,
        SEGMENT=segment_size,
        BLOCK_S=max(16, triton.next_power_of_2(segment_size)),
        num_warps=8 if segment_size > 128 else 4,
        num_stages=1,  # two rounds at most: nothing to prefetch, and the keys fill shared memory
    )
    return order


class _FirstPass(NamedTuple):
    """What the second pass needs: launch arguments in the order of the kernels' signatures."""

    tensors: tuple[Tensor, ...]
    strides: tuple[tuple[int, ...], tuple[int, ...]]
    sizes: tuple[float, int, int, int, int]
    shape: dict[str, int]


def _first_pass(proxy: Tensor, k: Tensor, num_keys: int, scale: float) -> _FirstPass:
    """Maximum and sum of every proxy query over each chunk of the first ``num_keys`` keys."""
    proxy, k = (x if x.stride(3) == 1 else x.contiguous() for x in (proxy, k))
    batch, num_heads, num_proxy, head_dim = proxy.shape
    block_d = triton.next_power_of_2(max(head_dim, 16))
    block_m = min(64, triton.next_power_of_2(max(num_proxy, 16)))
    shape = {
        "GROUP": num_heads // k.shape[1],
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_M": block_m,
        "BLOCK_N": 64 if block_d * k.element_size() > 256 else 128,
    }
    tiles = triton.cdiv(num_keys, shape["BLOCK_N"])
    chunk_size = triton.cdiv(tiles, MAX_CHUNKS) * shape["BLOCK_N"]
    num_chunks = triton.cdiv(num_keys, chunk_size)
    maxima = proxy.new_empty(batch * num_heads, num_chunks, num_proxy, dtype=torch.float32)
    sums = torch.empty_like(maxima)
    sizes = (scale * LOG2_E, num_heads, num_keys, num_proxy, num_chunks)
    strides = (proxy.stride(), k.stride())
    proxy_normaliser_kernel[(num_chunks, batch * num_heads, triton.cdiv(num_proxy, block_m))](
        proxy, k, maxima, sums, *strides, *sizes, chunk_size, **shape
    )
    return _FirstPass((proxy, k, maxima, sums), strides, sizes, shape)


def sort_segments(scores: Tensor, *, num_keys: int, segment_size: int) -> Tensor:
    """One program per segment, which it sorts in registers."""
    scores = scores.contiguous()
    batch, num_heads, num_scores = scores.shape
    order = torch.empty(batch, num_heads, num_keys, dtype=torch.int64, device=scores.device)
    if num_scores < num_keys:
        order[..., num_scores:] = torch.arange(num_scores, num_keys, device=scores.device)
    sort_segments_kernel[(num_scores // segment_size, batch * num_heads)](
        scores,
        order,
        num_scores,
        num_keys,
        SEGMENT=segment_size,
        BLOCK_S=triton.next_power_of_2(segment_size),
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

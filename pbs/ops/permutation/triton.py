"""Triton kernels: scores without writing logits, a sort per segment in registers, row gathers.

Legend: see :mod:`pbs.ops.grid`; P proxy queries, S segment. In the kernels: M proxy rows, N keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
# Keys that one program of the first pass reduces to a maximum and a sum per proxy query.
CHUNK = 4096


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
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: maximum and sum of exponentials of BLOCK_M proxy queries over CHUNK keys."""
    chunk = tl.program_id(0)
    batch = tl.program_id(1) // num_heads
    head = tl.program_id(1) % num_heads
    proxy = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    q = _load_proxy(q_ptr, q_strides, batch, head, proxy, dims, num_proxy, HEAD_DIM)
    k_base = k_ptr + batch.to(tl.int64) * k_strides[0] + (head // GROUP).to(tl.int64) * k_strides[1]
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    for start in range(0, CHUNK, BLOCK_N):
        rows = chunk * CHUNK + start + tl.arange(0, BLOCK_N)
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
def key_importance_kernel(
    q_ptr,
    k_ptr,
    normaliser_ptr,
    scores_ptr,
    q_strides,
    k_strides,
    scale_log2,
    num_heads,
    num_keys,
    num_proxy,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: mean probability of BLOCK_N keys over all proxy queries."""
    batch = tl.program_id(1) // num_heads
    head = tl.program_id(1) % num_heads
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    k_base = k_ptr + batch.to(tl.int64) * k_strides[0] + (head // GROUP).to(tl.int64) * k_strides[1]
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in range(0, num_proxy, BLOCK_M):
        proxy = start + tl.arange(0, BLOCK_M)
        q = _load_proxy(q_ptr, q_strides, batch, head, proxy, dims, num_proxy, HEAD_DIM)
        logits = _logits(q, k_base, rows, k_strides[2], dims, num_keys, scale_log2, HEAD_DIM)
        places = tl.program_id(1) * num_proxy + proxy
        # +inf makes the probability of a row that does not exist 0.
        normaliser = tl.load(normaliser_ptr + places, mask=proxy < num_proxy, other=float("inf"))
        total += tl.sum(tl.exp2(logits - normaliser[:, None]), 0)
    places = tl.program_id(1).to(tl.int64) * num_keys + rows
    tl.store(scores_ptr + places, total / num_proxy, mask=rows < num_keys)


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
    # Scores are not negative, so their bits are ordered like them. The index below the score makes
    # every key different and puts the lower index first; what is outside the segment comes last.
    bits = tl.where(inside, scores.to(tl.int32, bitcast=True).to(tl.int64), -1)
    ranked = tl.sort(bits * BLOCK_S + (BLOCK_S - 1 - local), descending=True)
    order = segment * SEGMENT + (BLOCK_S - 1 - (ranked & (BLOCK_S - 1)))
    tl.store(order_ptr + head * num_keys + segment * SEGMENT + local, order, mask=inside)


@triton.jit
def gather_keys_kernel(
    x_ptr,
    order_ptr,
    out_ptr,
    x_strides,
    num_heads,
    num_keys,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_N rows of one head."""
    batch = tl.program_id(1) // num_heads
    head = tl.program_id(1) % num_heads
    places = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = places < num_keys
    dims = tl.arange(0, BLOCK_D)
    base = tl.program_id(1).to(tl.int64) * num_keys
    source = tl.load(order_ptr + base + places, mask=exists, other=0)
    x_base = x_ptr + batch.to(tl.int64) * x_strides[0] + (head // GROUP).to(tl.int64) * x_strides[1]
    keep = exists[:, None] & (dims < HEAD_DIM)[None, :]
    rows = tl.load(x_base + source[:, None] * x_strides[2] + dims[None, :], mask=keep, other=0.0)
    out = out_ptr + (base + places)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out, rows, mask=keep)  # [N, D]


def key_importance(proxy: Tensor, k: Tensor, *, scale: float) -> Tensor:
    """Two passes over the keys: normalisers of the proxy queries, then means per key."""
    proxy, k = (x if x.stride(3) == 1 else x.contiguous() for x in (proxy, k))
    batch, num_heads, num_proxy, head_dim = proxy.shape
    num_keys = k.shape[2]
    block_d = triton.next_power_of_2(max(head_dim, 16))
    block_m = min(64, triton.next_power_of_2(max(num_proxy, 16)))
    shape = {
        "GROUP": num_heads // k.shape[1],
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_M": block_m,
        "BLOCK_N": 64 if block_d * k.element_size() > 256 else 128,
    }
    num_chunks = triton.cdiv(num_keys, CHUNK)
    maxima = proxy.new_empty(batch * num_heads, num_chunks, num_proxy, dtype=torch.float32)
    sums = torch.empty_like(maxima)
    programs = (num_chunks, batch * num_heads, triton.cdiv(num_proxy, block_m))
    sizes = (scale * LOG2_E, num_heads, num_keys, num_proxy)
    proxy_normaliser_kernel[programs](
        proxy, k, maxima, sums, proxy.stride(), k.stride(), *sizes, num_chunks, **shape, CHUNK=CHUNK
    )
    largest = maxima.amax(dim=1, keepdim=True)
    normaliser = largest.squeeze(1) + (sums * (maxima - largest).exp2()).sum(dim=1).log2()
    scores = proxy.new_empty(batch, num_heads, num_keys, dtype=torch.float32)
    programs = (triton.cdiv(num_keys, shape["BLOCK_N"]), batch * num_heads)
    key_importance_kernel[programs](
        proxy, k, normaliser, scores, proxy.stride(), k.stride(), *sizes, **shape
    )
    return scores


def sort_segments(scores: Tensor, *, num_keys: int, segment_size: int) -> Tensor:
    """One program per segment, which it sorts in registers."""
    scores = scores.contiguous()
    batch, num_heads, num_scores = scores.shape
    order = torch.empty(batch, num_heads, num_keys, dtype=torch.int64, device=scores.device)
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
    x = x if x.stride(3) == 1 else x.contiguous()
    order = order.contiguous()
    batch, num_heads, num_keys = order.shape
    head_dim = x.shape[3]
    out = x.new_empty(batch, num_heads, num_keys, head_dim)
    gather_keys_kernel[(triton.cdiv(num_keys, 64), batch * num_heads)](
        x,
        order,
        out,
        x.stride(),
        num_heads,
        num_keys,
        GROUP=num_heads // x.shape[1],
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_N=64,
    )
    return out

"""Triton: two passes over the keys, softmax statistics and then block sums; no logits in memory.

Legend: see :mod:`pbs.ops.grid`; s stride. In the kernel: M query groups, N key groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pbs.ops.grid import BlockGrid
from pbs.ops.primitives import LOG2_E, finite, fold, load_rows, offset


@triton.jit
def _group_logits(
    q_base,
    k_base,
    q_stride,
    k_stride,
    rows,
    columns,
    ends,
    dims,
    num_queries,
    num_keys,
    scale_log2,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Base-2 logits of a tile of groups: one product of s slices, each one token of a group."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for token in range(STRIDE):
        q_rows = rows * STRIDE + STRIDE - 1 - token
        k_rows = columns * STRIDE + token
        q = load_rows(q_base, q_rows, q_stride, q_rows < num_queries, dims, HEAD_DIM)  # [M, D]
        k = load_rows(k_base, k_rows, k_stride, k_rows < num_keys, dims, HEAD_DIM)  # [N, D]
        acc = tl.dot(q, tl.trans(k), acc, input_precision="ieee")
    return tl.where(columns[None, :] < ends[:, None], acc * scale_log2, float("-inf"))


@triton.jit
def antidiagonal_block_sums_kernel(
    q_ptr,
    k_ptr,
    ends_ptr,
    beside_ptr,
    sums_ptr,
    q_strides,
    k_strides,
    scale_log2,
    num_heads,
    num_queries,
    num_keys,
    num_groups,
    num_query_tiles,
    num_key_tiles,
    GROUP: tl.constexpr,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    QUERY_GROUPS: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    HAS_BESIDE: tl.constexpr,
):
    """One program: BLOCK_M query groups of one head, all their key groups."""
    # Later queries attend to more keys: start the longest programs first.
    part = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1) // num_heads
    head = tl.program_id(1) % num_heads
    rows = part * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    ends = tl.load(ends_ptr + rows, mask=rows < num_groups, other=0)
    q_base = q_ptr + offset(q_strides, batch, head)
    k_base = k_ptr + offset(k_strides, batch, head // GROUP)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    if HAS_BESIDE:
        place = tl.program_id(1).to(tl.int64) * num_groups
        row_max = tl.load(beside_ptr + place + rows, mask=rows < num_groups, other=float("-inf"))
        row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0)
    last = tl.max(ends, 0)
    for start in range(0, last, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        logits = _group_logits(
            q_base,
            k_base,
            q_strides[2],
            k_strides[2],
            rows,
            columns,
            ends,
            dims,
            num_queries,
            num_keys,
            scale_log2,
            STRIDE,
            HEAD_DIM,
            BLOCK_M,
            BLOCK_N,
        )
        _, _, row_max, row_sum = fold(row_max, row_sum, logits, 1.0, True)
    reference = finite(row_max)
    share = 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum)
    tiles = part * (BLOCK_M // QUERY_GROUPS) + tl.arange(0, BLOCK_M // QUERY_GROUPS)
    out = sums_ptr + (tl.program_id(1).to(tl.int64) * num_query_tiles + tiles) * num_key_tiles
    for start in range(0, last, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        logits = _group_logits(
            q_base,
            k_base,
            q_strides[2],
            k_strides[2],
            rows,
            columns,
            ends,
            dims,
            num_queries,
            num_keys,
            scale_log2,
            STRIDE,
            HEAD_DIM,
            BLOCK_M,
            BLOCK_N,
        )
        weights = tl.exp2(logits - reference[:, None]) * share[:, None]  # [M, N]
        weights = tl.reshape(weights, [BLOCK_M, BLOCK_N // KEY_GROUPS, KEY_GROUPS])
        weights = tl.sum(weights, 2)
        weights = tl.reshape(
            weights, [BLOCK_M // QUERY_GROUPS, QUERY_GROUPS, BLOCK_N // KEY_GROUPS]
        )
        blocks = start // KEY_GROUPS + tl.arange(0, BLOCK_N // KEY_GROUPS)
        keep = (tiles < num_query_tiles)[:, None] & (blocks < num_key_tiles)[None, :]
        tl.store(out[:, None] + blocks[None, :], tl.sum(weights, 1), mask=keep)


def antidiagonal_block_sums(
    q: Tensor,
    k: Tensor,
    *,
    stride: int,
    scale: float,
    grid: BlockGrid,
    ends: Tensor,
    beside: Tensor | None,
) -> Tensor:
    """See :func:`pbs.ops.antidiagonal.api.antidiagonal_block_sums`."""
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    batch, num_heads, _, head_dim = q.shape
    shape = (batch, num_heads, grid.num_query_tiles, grid.num_key_tiles)
    sums = torch.zeros(shape, dtype=torch.float32, device=q.device)
    query_groups, key_groups = grid.query_tile // stride, grid.key_tile // stride
    is_small = head_dim * q.element_size() > 256
    side = max(32 if is_small else 128, query_groups, key_groups)
    programs = (triton.cdiv(len(ends), side), batch * num_heads)
    antidiagonal_block_sums_kernel[programs](
        q,
        k,
        ends,
        sums if beside is None else (beside * LOG2_E).contiguous(),
        sums,
        q.stride(),
        k.stride(),
        scale / stride * LOG2_E,
        num_heads,
        grid.num_queries,
        grid.num_keys,
        len(ends),
        grid.num_query_tiles,
        grid.num_key_tiles,
        GROUP=num_heads // k.shape[1],
        STRIDE=stride,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(max(head_dim, 16)),
        BLOCK_M=side,
        BLOCK_N=side,
        QUERY_GROUPS=query_groups,
        KEY_GROUPS=key_groups,
        HAS_BESIDE=beside is not None,
        num_warps=4 if is_small else 8,
        num_stages=2 if is_small else 3,
    )
    return sums

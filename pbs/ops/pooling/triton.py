"""Triton: each tile read once. Legend: see :mod:`pbs.ops.grid`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pbs.ops.primitives import load_rows


@triton.jit
def mean_pool_kernel(
    x_ptr,
    means_ptr,
    x_strides,
    num_heads,
    num_tokens,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COUNTS_PADDING: tl.constexpr,
):
    """One program: one tile of one head."""
    tile = tl.program_id(0)
    plane = tl.program_id(1).to(tl.int64)
    batch, head = plane // num_heads, plane % num_heads
    dims = tl.arange(0, BLOCK_D)
    base = x_ptr + batch * x_strides[0] + head * x_strides[1]
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(0, TILE, BLOCK_N):
        rows = tile * TILE + start + tl.arange(0, BLOCK_N)
        x = load_rows(base, rows, x_strides[2], rows < num_tokens, dims, HEAD_DIM)  # [N, D]
        total += tl.sum(x.to(tl.float32), 0)
    count = TILE
    if not COUNTS_PADDING:
        count = tl.minimum(TILE, num_tokens - tile * TILE)
    place = (plane * tl.num_programs(0) + tile) * HEAD_DIM
    tl.store(means_ptr + place + dims, total / count, mask=dims < HEAD_DIM)


def mean_pool(x: Tensor, tile: int, *, pad_mean: str) -> Tensor:
    """See :func:`pbs.ops.pooling.api.mean_pool`."""
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, num_heads, num_tokens, head_dim = x.shape
    num_tiles = triton.cdiv(num_tokens, tile)
    means = x.new_empty(batch, num_heads, num_tiles, head_dim, dtype=torch.float32)
    mean_pool_kernel[(num_tiles, batch * num_heads)](
        x,
        means,
        x.stride(),
        num_heads,
        num_tokens,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        TILE=tile,
        BLOCK_N=min(tile, 64),
        COUNTS_PADDING=pad_mean == "reference",
    )
    return means

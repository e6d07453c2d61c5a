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
    TILES: tl.constexpr,
    STEP: tl.constexpr,
    COUNTS_PADDING: tl.constexpr,
):
    """One program: some tiles of one head, STEP tokens of each at a time."""
    tiles = tl.program_id(0) * TILES + tl.arange(0, TILES)  # [T]
    num_tiles = (num_tokens + TILE - 1) // TILE
    plane = tl.program_id(1).to(tl.int64)
    batch, head = plane // num_heads, plane % num_heads
    dims = tl.arange(0, BLOCK_D)
    base = x_ptr + batch * x_strides[0] + head * x_strides[1]
    total = tl.zeros([TILES, BLOCK_D], dtype=tl.float32)
    for start in tl.range(0, TILE, STEP, loop_unroll_factor=8):
        rows = tl.reshape(tiles[:, None] * TILE + start + tl.arange(0, STEP)[None, :], TILES * STEP)
        x = load_rows(base, rows, x_strides[2], rows < num_tokens, dims, HEAD_DIM).to(tl.float32)
        total += tl.sum(tl.reshape(x, [TILES, STEP, BLOCK_D]), 1)
    count = tl.full([TILES], TILE, tl.int32)
    if not COUNTS_PADDING:
        count = tl.minimum(count, num_tokens - tiles * TILE)
    places = (plane * num_tiles + tiles)[:, None] * HEAD_DIM + dims[None, :]
    keep = (tiles < num_tiles)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(means_ptr + places, total / count[:, None], mask=keep)


def mean_pool(x: Tensor, tile: int, *, pad_mean: str) -> Tensor:
    """See :func:`pbs.ops.pooling.api.mean_pool`."""
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, num_heads, num_tokens, head_dim = x.shape
    num_tiles = triton.cdiv(num_tokens, tile)
    means = x.new_empty(batch, num_heads, num_tiles, head_dim, dtype=torch.float32)
    # Of small tiles many at once, a token of each at a time: nothing moves between threads.
    together, step = (16, 1) if tile < 64 else (1, 64)
    mean_pool_kernel[(triton.cdiv(num_tiles, together), batch * num_heads)](
        x,
        means,
        x.stride(),
        num_heads,
        num_tokens,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        TILE=tile,
        TILES=together,
        STEP=step,
        COUNTS_PADDING=pad_mean == "reference",
    )
    return means

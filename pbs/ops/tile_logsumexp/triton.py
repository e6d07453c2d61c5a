"""Triton: a program holds some rows and passes over the tiles they see, each written once.

Legend: see :mod:`pbs.ops.grid`; M rows of a program, T keys of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pbs.ops.primitives import LOG2_E, finite, load_rows, offset

LN_2 = 1 / LOG2_E
# Rows of a program, and keys of a product at least (smaller tiles are computed several at a time);
# halves of them for elements of 4 bytes, which spill otherwise.
BLOCK_M = 64
MIN_WIDTH = 64


@triton.jit
def tile_logsumexp_kernel(
    rows_ptr,
    keys_ptr,
    begins_ptr,
    ends_ptr,
    sums_ptr,
    rows_strides,
    keys_strides,
    num_heads,
    num_rows,
    num_keys,
    num_tiles,
    scale_log2,
    ln_2,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program: some rows of one head."""
    plane = tl.program_id(1).to(tl.int64)
    batch, head = plane // num_heads, plane % num_heads
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    is_row = rows < num_rows
    dims = tl.arange(0, BLOCK_D)
    begins = tl.load(begins_ptr + head * num_rows + rows, mask=is_row, other=num_keys)
    ends = tl.load(ends_ptr + head * num_rows + rows, mask=is_row, other=0)
    q_base = rows_ptr + offset(rows_strides, batch, head)
    q = load_rows(q_base, rows, rows_strides[2], is_row, dims, HEAD_DIM)  # [M, D]
    k_base = keys_ptr + offset(keys_strides, batch, head // GROUP)
    places = (plane * num_rows + rows) * num_tiles  # [M]
    first = tl.min(begins, 0) // WIDTH * WIDTH
    for start in range(first, tl.max(ends, 0), WIDTH):
        tokens = start + tl.arange(0, WIDTH)  # [T]
        k = load_rows(k_base, tokens, keys_strides[2], tokens < num_keys, dims, HEAD_DIM)  # [T, D]
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2  # [M, T]
        seen = (tokens[None, :] >= begins[:, None]) & (tokens[None, :] < ends[:, None])
        logits = tl.where(seen, logits, float("-inf"))
        logits = tl.reshape(logits, [BLOCK_M, WIDTH // TILE, TILE])
        largest = tl.max(logits, 2)  # [M, tiles]
        held = tl.sum(tl.exp2(logits - finite(largest)[:, :, None]), 2)
        value = (largest + tl.log2(tl.maximum(held, 1e-37))) * ln_2
        tiles = start // TILE + tl.arange(0, WIDTH // TILE)
        keep = is_row[:, None] & (tiles < num_tiles)[None, :] & (held > 0.0)
        tl.store(sums_ptr + places[:, None] + tiles[None, :], value, mask=keep)


def tile_logsumexp(
    rows: Tensor, keys: Tensor, begins: Tensor, ends: Tensor, *, tile: int, scale: float
) -> Tensor:
    """See :func:`pbs.ops.tile_logsumexp.api.tile_logsumexp`."""
    rows, keys = (x if x.stride(3) == 1 else x.contiguous() for x in (rows, keys))
    batch, num_heads, num_rows, head_dim = rows.shape
    num_keys = keys.shape[2]
    num_tiles = triton.cdiv(num_keys, tile)
    block_m, min_width = BLOCK_M, MIN_WIDTH
    if rows.element_size() == 4:
        block_m, min_width = BLOCK_M // 2, MIN_WIDTH // 2
    sums = rows.new_full(
        (batch, num_heads, num_rows, num_tiles), float("-inf"), dtype=torch.float32
    )
    tile_logsumexp_kernel[(triton.cdiv(num_rows, block_m), batch * num_heads)](
        rows,
        keys,
        begins.int().contiguous(),
        ends.int().contiguous(),
        sums,
        rows.stride(),
        keys.stride(),
        num_heads,
        num_rows,
        num_keys,
        num_tiles,
        scale * LOG2_E,
        LN_2,
        GROUP=num_heads // keys.shape[1],
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_M=block_m,
        TILE=tile,
        WIDTH=max(tile, min_width),
    )
    return sums

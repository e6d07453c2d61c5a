"""Triton: log-sums of each block's logits, then their softmax; no logits in memory.

Legend: see :mod:`pbs.ops.grid`; s stride. In the kernel: M query groups, N key groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pbs.ops.grid import BlockGrid
from pbs.ops.primitives import LOG2_E, load_rows, offset
from pbs.ops.tile_logsumexp.triton import LN_2, write_tiles
from pbs.ops.tile_masses.triton import tile_masses

# Log-sums held at once: 2^26 fp32 values are 256 MB.
MAX_SUMS = 1 << 26


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
def antidiagonal_log_sums_kernel(
    q_ptr,
    k_ptr,
    ends_ptr,
    sums_ptr,
    q_strides,
    k_strides,
    scale_log2,
    num_heads,
    num_queries,
    num_keys,
    first_group,
    num_groups,
    num_key_tiles,
    row_width,
    ln_2,
    GROUP: tl.constexpr,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
):
    """One program: BLOCK_M query groups of one head, all their key groups."""
    # Later queries attend to more keys: start the longest programs first.
    part = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1) // num_heads
    head = tl.program_id(1) % num_heads
    local = part * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = local < num_groups
    rows = first_group + local
    dims = tl.arange(0, BLOCK_D)
    ends = tl.load(ends_ptr + rows, mask=is_row, other=0)
    q_base = q_ptr + offset(q_strides, batch, head)
    k_base = k_ptr + offset(k_strides, batch, head // GROUP)
    places = (tl.program_id(1).to(tl.int64) * num_groups + local) * row_width
    for start in range(0, tl.max(ends, 0), BLOCK_N):
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
        write_tiles(sums_ptr, logits, places, is_row, start, num_key_tiles, ln_2, KEY_GROUPS, True)


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
    """See :func:`pbs.ops.antidiagonal.api.antidiagonal_block_sums`; some query tiles at a time."""
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    batch, num_heads = q.shape[:2]
    shape = (batch, num_heads, grid.num_query_tiles, grid.num_key_tiles)
    sums = torch.zeros(shape, dtype=torch.float32, device=q.device)
    per_tile = grid.query_tile // stride
    starts = torch.arange(grid.num_query_tiles, device=q.device) * grid.query_tile
    tokens = (grid.num_queries - starts).clamp(max=grid.query_tile)
    counts = (tokens + stride - 1) // stride
    step = max(1, MAX_SUMS // (batch * num_heads * per_tile * grid.num_key_tiles))
    for first in range(0, grid.num_query_tiles, step):
        tiles = slice(first, min(first + step, grid.num_query_tiles))
        groups = slice(tiles.start * per_tile, tiles.stop * per_tile)
        width = grid.num_causal_key_tiles(tiles.stop)
        parts = q.new_full(
            # What is beside stands behind the last tile, and takes no part in what is returned.
            (batch, num_heads, groups.stop - groups.start, width + (beside is not None)),
            float("-inf"),
            dtype=torch.float32,
        )
        if beside is not None:
            parts[..., width] = beside[..., groups]
        _log_sums(q, k, ends, parts, groups, width, stride=stride, scale=scale, grid=grid)
        masses = tile_masses(
            parts.unflatten(2, (-1, per_tile)),
            counts[tiles],
            torch.full_like(counts[tiles], width),
            power=1.0,
            smooth=None,
            smooth_counts=None,
            share=0.0,
        )
        sums[:, :, tiles, :width] = masses[..., :width]
    return sums.mul_(counts[:, None])


def _log_sums(
    q: Tensor,
    k: Tensor,
    ends: Tensor,
    parts: Tensor,
    groups: slice,
    width: int,
    *,
    stride: int,
    scale: float,
    grid: BlockGrid,
) -> None:
    """Write the log-sums of some query groups over the first ``width`` key tiles."""
    batch, num_heads, _, head_dim = q.shape
    key_groups = grid.key_tile // stride
    is_small = head_dim * q.element_size() > 256
    side = max(32 if is_small else 128, key_groups)
    programs = (triton.cdiv(groups.stop - groups.start, side), batch * num_heads)
    antidiagonal_log_sums_kernel[programs](
        q,
        k,
        ends,
        parts,
        q.stride(),
        k.stride(),
        scale / stride * LOG2_E,
        num_heads,
        grid.num_queries,
        grid.num_keys,
        groups.start,
        groups.stop - groups.start,
        width,
        parts.shape[3],
        LN_2,
        GROUP=num_heads // k.shape[1],
        STRIDE=stride,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(max(head_dim, 16)),
        BLOCK_M=side,
        BLOCK_N=side,
        KEY_GROUPS=key_groups,
        num_warps=4 if is_small else 8,
        num_stages=2 if is_small else 3,
    )

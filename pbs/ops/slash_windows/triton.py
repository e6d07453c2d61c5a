"""Triton: each lane walks the windows of one tile; a program keeps the columns of one tile.

Legend: see :mod:`pbs.ops.slash_windows.api`. In the kernels: M tiles, C columns of a step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tiles that a program walks side by side: their loads hide each other's waits.
BLOCK_M = 64
BLOCK_C = 1024


@triton.jit
def walk_windows_kernel(
    table_ptr,
    ends_ptr,
    windows_ptr,
    counts_ptr,
    num_tiles,
    num_places,
    num_keys,
    widest,
    WIDTH: tl.constexpr,
    WRITES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program: some tiles of one row; counts alone, or windows too."""
    row = tl.program_id(1).to(tl.int64)
    tiles = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    is_tile = tiles < num_tiles
    ends = tl.load(ends_ptr + tiles, mask=is_tile, other=0)
    table_ptr += row * num_places
    place = ends + WIDTH - 1
    count = tl.zeros([BLOCK_M], tl.int32)
    step = 0
    moves = is_tile
    while tl.max(moves.to(tl.int32), 0) > 0:
        following = tl.load(table_ptr + place, mask=moves, other=0)
        moves = moves & (following != place)
        place = tl.where(moves, following, place)
        starts = ends - WIDTH - (place - (WIDTH - 1))
        # The last window of a partial tile may begin past the last key.
        valid = moves & (starts < num_keys)
        count += valid.to(tl.int32)
        if WRITES:
            out = windows_ptr + (row * num_tiles + tiles) * widest + step
            tl.store(out, starts.to(tl.int32), mask=valid)
        step += 1
    tl.store(counts_ptr + row * num_tiles + tiles, count, mask=is_tile)


@triton.jit
def columns_outside_kernel(
    chosen_ptr,
    num_chosen_ptr,
    windows_ptr,
    num_windows_ptr,
    first_ptr,
    kept_ptr,
    counts_ptr,
    num_slots,
    num_windows_at_most,
    num_steps,
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: one tile of one row."""
    row = tl.program_id(1).to(tl.int64)
    tile = row * tl.num_programs(0) + tl.program_id(0)
    windows_ptr += tile * num_windows_at_most
    num_windows = tl.load(num_windows_ptr + tile)
    first = tl.load(first_ptr + tl.program_id(0))
    num_chosen = tl.load(num_chosen_ptr + row)
    total = tl.zeros([], tl.int32)
    for start in range(0, num_slots, BLOCK_C):
        slots = start + tl.arange(0, BLOCK_C)  # [C]
        is_column = slots < num_chosen
        keys = tl.load(chosen_ptr + row * num_slots + slots, mask=is_column, other=0).to(tl.int32)
        # How many windows begin at or before each key.
        low = tl.zeros([BLOCK_C], tl.int32)
        high = tl.zeros([BLOCK_C], tl.int32) + num_windows
        for _ in range(num_steps):
            is_open = low < high
            middle = (low + high) // 2
            begins = tl.load(windows_ptr + middle, mask=is_open, other=0)
            is_before = is_open & (begins <= keys)
            low = tl.where(is_before, middle + 1, low)
            high = tl.where(is_open & (begins > keys), middle, high)
        nearest = tl.load(windows_ptr + low - 1, mask=low > 0, other=0)
        inside = (low > 0) & (keys - nearest < WIDTH)
        keep = is_column & (inside == 0) & (keys < first)
        places = total + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(kept_ptr + tile * num_slots + places, keys, mask=keep)
        total += tl.sum(keep.to(tl.int32), 0)
    tl.store(counts_ptr + tile, total)


def walk_windows(
    table: Tensor, ends: Tensor, *, width: int, num_keys: int
) -> tuple[Tensor, Tensor]:
    """See :func:`pbs.ops.slash_windows.api.walk_windows`: counted first, then written."""
    table, ends = table.contiguous(), ends.contiguous()
    num_rows, num_tiles = len(table), len(ends)
    counts = torch.zeros(num_rows, num_tiles, dtype=torch.int32, device=table.device)

    def walk(windows: Tensor, *, writes: bool) -> None:
        walk_windows_kernel[(triton.cdiv(num_tiles, BLOCK_M), num_rows)](
            table,
            ends,
            windows,
            counts,
            num_tiles,
            table.shape[1],
            num_keys,
            windows.shape[-1],
            WIDTH=width,
            WRITES=writes,
            BLOCK_M=BLOCK_M,
            num_warps=2,
        )

    walk(counts, writes=False)
    windows = counts.new_zeros(num_rows, num_tiles, int(counts.max()))
    walk(windows, writes=True)
    return windows, counts


def columns_outside(
    chosen: Tensor,
    num_chosen: Tensor,
    windows: Tensor,
    num_windows: Tensor,
    first: Tensor,
    *,
    width: int,
) -> tuple[Tensor, Tensor]:
    """See :func:`pbs.ops.slash_windows.api.columns_outside`."""
    num_slots, num_tiles = chosen.shape[-1], len(first)
    kept = windows.new_zeros(len(chosen), num_tiles, num_slots)
    counts = windows.new_zeros(len(chosen), num_tiles)
    if num_slots:
        columns_outside_kernel[(num_tiles, len(chosen))](
            chosen.contiguous(),
            num_chosen.int().contiguous(),
            windows.contiguous(),
            num_windows.int().contiguous(),
            first.contiguous(),
            kept,
            counts,
            num_slots,
            windows.shape[-1],
            windows.shape[-1].bit_length(),
            WIDTH=width,
            BLOCK_C=min(BLOCK_C, triton.next_power_of_2(num_slots)),
        )
    return kept[..., : int(counts.max())], counts

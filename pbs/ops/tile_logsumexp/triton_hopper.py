"""Gluon kernel for Hopper: one warp loads keys, four groups of four warps take turns with them.

A tile of keys is read once for 256 rows, and while one group of 64 rows computes exponentials the
matrix unit works for another. Legend: see :mod:`pbs.ops.grid`; in the kernel: M rows of a group,
N keys of a step.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from pbs.ops.primitives import LOG2_E
from pbs.ops.triton_hopper import ROWS, descriptor, load_tile, over_columns, start_logits

LN_2 = 1 / LOG2_E
# Groups of a program; keys of a step, which are one tile; steps whose results are stored together.
_GROUPS = gl.constexpr(4)
STEP = 128
_TOGETHER = gl.constexpr(4)
_STAGES = 3


@gluon.jit
def _produce(tiles, rings, steps):
    """The warp that loads: rows once, then tiles of moved keys, then of keys in natural order."""
    q_buffer, q_ready, k_buffers, k_ready, k_free = rings
    rows_descriptor, keys_descriptor, natural_descriptor = tiles[:3]
    plane, key_plane, natural_plane, first_row = tiles[3:]
    num_moved, first, num_natural = steps
    GROUPS: gl.constexpr = q_buffer.shape[0]
    ROWS: gl.constexpr = q_buffer.shape[2]
    BLOCK_N: gl.constexpr = k_buffers.shape[2]
    BLOCK_D: gl.constexpr = k_buffers.shape[3]
    NUM_BYTES: gl.constexpr = BLOCK_N * BLOCK_D * 2
    mbarrier.expect(q_ready, GROUPS * ROWS * BLOCK_D * 2)
    for group in gl.static_range(GROUPS):
        tma.async_copy_global_to_shared(
            rows_descriptor, [plane, first_row + group * ROWS, 0], q_ready, q_buffer.index(group)
        )
    for step in range(num_moved):
        start = step * BLOCK_N
        load_tile(
            keys_descriptor, key_plane, start, k_buffers, k_ready, k_free, step, NUM_BYTES, False
        )
    for step in range(num_natural):
        start = (first + step) * BLOCK_N
        at = num_moved + step
        load_tile(
            natural_descriptor, natural_plane, start, k_buffers, k_ready, k_free, at, NUM_BYTES,
            False,
        )  # fmt: skip


@gluon.jit
def _log_sums(logits, scale_log2, ln_2, MASKED: gl.constexpr):
    """Logarithms [M] of sums of exponentials over rows of logits [M, N]; sums, up to a factor."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, logits.type.layout)
    largest = gl.max(gl.max(over_columns(logits), 1), 1)
    reference = gl.convert_layout(largest, LAYOUT) * scale_log2
    if MASKED:
        reference = gl.where(reference == float("-inf"), 0.0, reference)
    held = gl.exp2(logits * scale_log2 - reference[:, None])
    held = gl.convert_layout(gl.sum(gl.sum(over_columns(held), 1), 1), LAYOUT)
    return (reference + gl.log2(gl.maximum(held, 1e-37))) * ln_2, held


@gluon.jit
def _whole_tile(q, rings, step, zeros, scale_log2, ln_2):
    """Log-sums [M] of the keys of one step, all of which are seen."""
    _, _, k_buffers, k_ready, k_free = rings
    STAGES: gl.constexpr = k_buffers.shape[0]
    token = start_logits(q, k_buffers, k_ready, step, zeros)
    logits = warpgroup_mma_wait(0, deps=(token,))
    mbarrier.arrive(k_free.index(step % STAGES))
    value, _ = _log_sums(logits, scale_log2, ln_2, False)
    return value


@gluon.jit
def _consume(group: gl.constexpr, work, rings, steps, bounds):
    """One warpgroup: 64 rows over all tiles."""
    q_buffer, q_ready, k_buffers, k_ready, k_free = rings
    num_moved, first, num_natural = steps
    sums, ends_ptr, until_ptr, first_row, num_rows, num_tiles, scale_log2, ln_2 = work
    lowest_end, highest_end, highest_until = bounds
    ROWS: gl.constexpr = q_buffer.shape[2]
    BLOCK_N: gl.constexpr = k_buffers.shape[2]
    BLOCK_D: gl.constexpr = k_buffers.shape[3]
    STAGES: gl.constexpr = k_buffers.shape[0]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)

    q = q_buffer.index(group).reshape([ROWS, BLOCK_D])
    rows = first_row + group * ROWS + gl.arange(0, ROWS, s_rows)
    is_row = rows < num_rows
    places = sums + rows.to(gl.int64) * num_tiles
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    ends = gl.load(ends_ptr + rows, mask=is_row, other=0)
    until = gl.load(until_ptr + rows, mask=is_row, other=0)
    keys = gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
    mbarrier.wait(q_ready, 0)

    # 1. Tiles that all rows of the program see, four at a time: a store of one number a row would
    #    touch as much memory.
    for block in range(first // _TOGETHER):
        tile = block * _TOGETHER
        zeroth = _whole_tile(q, rings, tile, zeros, scale_log2, ln_2)
        one = _whole_tile(q, rings, tile + 1, zeros, scale_log2, ln_2)
        two = _whole_tile(q, rings, tile + 2, zeros, scale_log2, ln_2)
        three = _whole_tile(q, rings, tile + 3, zeros, scale_log2, ln_2)
        values = gl.join(gl.join(zeroth, two), gl.join(one, three)).reshape([ROWS, _TOGETHER])
        LAYOUT: gl.constexpr = values.type.layout
        tiles = tile + gl.arange(0, _TOGETHER, gl.SliceLayout(0, LAYOUT))
        begin = gl.convert_layout(places, gl.SliceLayout(1, LAYOUT))
        kept = gl.convert_layout(is_row, gl.SliceLayout(1, LAYOUT))
        gl.store(begin[:, None] + tiles[None, :], values, mask=kept[:, None])

    # 2. Moved keys that some rows see, then keys in natural order, from each row's end on.
    for step in range(first, num_moved + num_natural):
        is_moved = step < num_moved
        tile = gl.where(is_moved, step, step - num_moved + first)
        start = tile * BLOCK_N
        slot = step % STAGES
        is_seen = gl.where(
            is_moved, start < highest_end, (start < highest_until) & (start + BLOCK_N > lowest_end)
        )
        if is_seen:
            token = start_logits(q, k_buffers, k_ready, step, zeros)
            logits = warpgroup_mma_wait(0, deps=(token,))
            key = start + keys
            low = gl.where(is_moved, 0, ends)
            high = gl.where(is_moved, ends, until)
            seen = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
            logits = gl.where(seen, logits, float("-inf"))
            value, held = _log_sums(logits, scale_log2, ln_2, True)
            gl.store(places + tile, value, mask=is_row & (held > 0.0))
        else:
            mbarrier.wait(k_ready.index(slot), step // STAGES & 1)
        mbarrier.arrive(k_free.index(slot))


@gluon.jit
def _bounds(ends_ptr, until_ptr, first_row, num_rows, num_keys, layout: gl.constexpr):
    """Lowest and highest end and highest bound of natural keys of one group's rows."""
    SIZE: gl.constexpr = 64
    rows = first_row + gl.arange(0, SIZE, layout)
    is_row = rows < num_rows
    lowest = gl.min(gl.load(ends_ptr + rows, mask=is_row, other=num_keys), 0)
    highest = gl.max(gl.load(ends_ptr + rows, mask=is_row, other=0), 0)
    return lowest, highest, gl.max(gl.load(until_ptr + rows, mask=is_row, other=0), 0)


@gluon.jit
def hopper_tile_logsumexp_kernel(
    rows_descriptor,
    keys_descriptor,
    natural_descriptor,
    ends_ptr,
    until_ptr,
    sums_ptr,
    num_heads,
    num_key_heads,
    num_natural_heads,
    num_rows,
    num_keys,
    num_tiles,
    scale_log2,
    ln_2,
    HAS_NATURAL: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One program: 256 rows of one head."""
    dtype: gl.constexpr = rows_descriptor.dtype
    ROWS: gl.constexpr = rows_descriptor.block_shape[1]
    BLOCK_N: gl.constexpr = keys_descriptor.block_shape[1]
    BLOCK_D: gl.constexpr = keys_descriptor.block_shape[2]
    barrier_layout: gl.constexpr = mbarrier.MBarrierLayout()
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])

    # Later rows see more keys: start the longest programs of all heads first.
    first_row = (gl.num_programs(1) - 1 - gl.program_id(1)) * (_GROUPS * ROWS)
    plane = gl.program_id(0)
    batch, head = plane // num_heads, plane % num_heads
    ends, until = ends_ptr + head * num_rows, until_ptr + head * num_rows
    zeroth = _bounds(ends, until, first_row, num_rows, num_keys, line)
    one = _bounds(ends, until, first_row + ROWS, num_rows, num_keys, line)
    two = _bounds(ends, until, first_row + 2 * ROWS, num_rows, num_keys, line)
    three = _bounds(ends, until, first_row + 3 * ROWS, num_rows, num_keys, line)
    lowest = gl.minimum(gl.minimum(zeroth[0], one[0]), gl.minimum(two[0], three[0]))
    highest = gl.maximum(gl.maximum(zeroth[1], one[1]), gl.maximum(two[1], three[1]))
    first = lowest // (BLOCK_N * _TOGETHER) * _TOGETHER
    num_moved = (highest + BLOCK_N - 1) // BLOCK_N
    num_natural = 0
    if HAS_NATURAL:
        highest = gl.maximum(gl.maximum(zeroth[2], one[2]), gl.maximum(two[2], three[2]))
        num_natural = gl.maximum((highest + BLOCK_N - 1) // BLOCK_N - first, 0)

    q_buffer = gl.allocate_shared_memory(dtype, [_GROUPS, 1, ROWS, BLOCK_D], rows_descriptor.layout)
    k_buffers = gl.allocate_shared_memory(
        dtype, [STAGES, 1, BLOCK_N, BLOCK_D], keys_descriptor.layout
    )
    q_ready = gl.allocate_shared_memory(gl.int64, [1], barrier_layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    mbarrier.init(q_ready, count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(slot), count=1)
        mbarrier.init(k_free.index(slot), count=_GROUPS)
    fence_async_shared()

    key_plane = batch * num_key_heads + head // (num_heads // num_key_heads)
    natural_plane = batch * num_natural_heads + head // (num_heads // num_natural_heads)
    sums = sums_ptr + plane.to(gl.int64) * num_rows * num_tiles
    rings = (q_buffer, q_ready, k_buffers, k_ready, k_free)
    steps = (num_moved, first, num_natural)
    work = (sums, ends, until, first_row, num_rows, num_tiles, scale_log2, ln_2)
    tiles = (
        rows_descriptor,
        keys_descriptor,
        natural_descriptor,
        plane,
        key_plane,
        natural_plane,
        first_row,
    )
    gl.warp_specialize(
        [
            (_consume, (0, work, rings, steps, zeroth)),
            (_consume, (1, work, rings, steps, one)),
            (_consume, (2, work, rings, steps, two)),
            (_consume, (3, work, rings, steps, three)),
            (_produce, (tiles, rings, steps)),
        ],
        [4, 4, 4, 1],
        [112, 112, 112, 24],
    )


def takes(*, element_size: int, head_dim: int, tile: int, capability: tuple[int, int]) -> bool:
    """Whether this kernel runs: on Hopper, 16 bits, tiles of one step, head dims to 128."""
    fits = head_dim <= 128 and head_dim * element_size % 16 == 0
    return capability == (9, 0) and element_size == 2 and tile == STEP and fits


def tile_logsumexp(
    rows: Tensor,
    keys: Tensor,
    ends: Tensor,
    sums: Tensor,
    *,
    scale: float,
    natural: Tensor,
    until: Tensor | None,
) -> None:
    """Write the log-sums of tiles that rows see into ``sums``.

    Args:
        rows: ``[Z, Hq, R, D]``, as all inputs fit for descriptors.
        keys: ``[Z, Ho, Nk, D]``.
        ends: int32 ``[Hq, R]``, contiguous.
        sums: fp32 ``[Z, Hq, R, Tk]``, contiguous.
        scale: factor of the logits, positive.
        natural: ``[Z, Hkv, Nk, D]``; where ``until`` is None it is not read.
        until: int32 ``[Hq, R]``, contiguous.
    """
    batch, num_heads, num_rows, head_dim = rows.shape
    block_d = max(64, triton.next_power_of_2(head_dim))
    num_programs = triton.cdiv(num_rows, _GROUPS.value * ROWS)
    hopper_tile_logsumexp_kernel[(batch * num_heads, num_programs)](
        descriptor(rows, ROWS, block_d),
        descriptor(keys, STEP, block_d),
        descriptor(natural, STEP, block_d),
        ends,
        ends if until is None else until,
        sums,
        num_heads,
        keys.shape[1],
        natural.shape[1],
        num_rows,
        keys.shape[2],
        sums.shape[3],
        scale * LOG2_E,
        LN_2,
        HAS_NATURAL=until is not None,
        STAGES=_STAGES,
        num_warps=4,
    )

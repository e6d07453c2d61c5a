"""Gluon kernel for Hopper: one warp loads, two groups of four warps multiply and take turns.

What plain Triton leaves idle here is the matrix unit during a softmax. So 64 of a tile's 128 rows
go to each of two warpgroups, whose softmaxes fall at different times, and each warpgroup starts the
next tile's logits before the softmax of the current one (the schedule of FlashAttention-3, arXiv
2407.08608, section 3, on lists of tiles).

Measured on an H100 (``experiments/measured/h100_2026-11-23b``; bf16, 32 query and 8 key heads of
128, one order per key head): 587, 654 and 645 TFLOP/s on computed tiles at 8K (density 0.58), 128K
(0.22) and 512K (0.22) tokens, 0.84, 1.03 and 0.95 of the rate of FlashAttention-4's dense kernel
(medians of 2, 4 and 2 calls). At 128K the matrix unit is busy 81 % of the time (``profile.csv``).

A value that is not finite reaches all 64 rows of a warpgroup that computes it in a window, those
too that do not see it: their weight is 0, and 0 * NaN is NaN. (A key does not: its logits are
replaced.) :mod:`.triton` then takes windows again, value by value; here the tiles of V have left
shared memory by then.

Legend: see :mod:`pbs.ops.grid`. In the kernel: M query rows of a warpgroup, N keys, D head dim.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from pbs.ops.block_sparse_attention.common import WEIGHT_SHIFT
from pbs.ops.triton_hopper import load_tile, over_columns, start_logits

_SHIFT = gl.constexpr(WEIGHT_SHIFT)


@gluon.jit
def _produce(tiles, rings, KEY_TILE: gl.constexpr):
    """The warp that loads: q once, then K and V tiles in the order in which they are read."""
    q_buffer, q_ready, k_buffers, v_buffers, k_ready, v_ready, k_free, v_free = rings
    q_descriptor, k_descriptor, v_descriptor, ordered_k_descriptor, ordered_v_descriptor = tiles[:5]
    blocks, num_blocks, windows, num_windows, plane, kv_plane, order_plane, first_row = tiles[5:]
    BLOCK_N: gl.constexpr = k_buffers.shape[2]
    BLOCK_D: gl.constexpr = k_buffers.shape[3]
    PARTS: gl.constexpr = KEY_TILE // BLOCK_N
    ITEM: gl.constexpr = k_descriptor.dtype.primitive_bitwidth // 8
    NUM_BYTES: gl.constexpr = BLOCK_N * BLOCK_D * ITEM
    NUM_GROUPS: gl.constexpr = q_buffer.shape[0]
    ROWS: gl.constexpr = q_buffer.shape[2]
    EIGHT: gl.constexpr = ITEM == 1
    mbarrier.expect(q_ready, NUM_GROUPS * ROWS * BLOCK_D * ITEM)
    for group in gl.static_range(NUM_GROUPS):
        tma.async_copy_global_to_shared(
            q_descriptor, [plane, first_row + group * ROWS, 0], q_ready, q_buffer.index(group)
        )
    done = num_windows * PARTS
    for step in range(done):
        start = gl.load(windows + step // PARTS) + step % PARTS * BLOCK_N
        load_tile(k_descriptor, kv_plane, start, k_buffers, k_ready, k_free, step, NUM_BYTES, False)
        load_tile(v_descriptor, kv_plane, start, v_buffers, v_ready, v_free, step, NUM_BYTES, EIGHT)
    for step in range(num_blocks * PARTS):
        start = gl.load(blocks + step // PARTS).to(gl.int32) * KEY_TILE + step % PARTS * BLOCK_N
        at = done + step
        load_tile(
            ordered_k_descriptor, order_plane, start, k_buffers, k_ready, k_free, at, NUM_BYTES,
            False,
        )  # fmt: skip
        load_tile(
            ordered_v_descriptor, order_plane, start, v_buffers, v_ready, v_free, at, NUM_BYTES,
            EIGHT,
        )  # fmt: skip


@gluon.jit
def _start_values(weights, v_buffers, v_ready, step, acc):
    """acc plus weights times a V tile, not waited for."""
    STAGES: gl.constexpr = v_buffers.shape[0]
    FIRST: gl.constexpr = v_buffers.shape[2]
    SECOND: gl.constexpr = v_buffers.shape[3]
    slot = step % STAGES
    mbarrier.wait(v_ready.index(slot), step // STAGES & 1)
    values = v_buffers.index(slot).reshape([FIRST, SECOND])
    if v_buffers.dtype.primitive_bitwidth == 8:
        values = values.permute([1, 0])  # of [D, N]
    return warpgroup_mma(weights, values, acc, is_async=True)


@gluon.jit
def _as_operand(weights, dtype: gl.constexpr, layout: gl.constexpr):
    """Weights [M, N] as the left factor of the second product.

    Of eight bits, a thread's factors are four keys that follow each other, while it holds logits of
    two and two: values are stored in the order in which threads have their weights
    (:func:`pbs.ops.quantisation.quantise_values`), so that none moves between threads.
    """
    if dtype.primitive_bitwidth == 8:
        ROWS: gl.constexpr = weights.shape[0]
        BLOCK_N: gl.constexpr = weights.shape[1]
        weights = weights.reshape([ROWS, BLOCK_N // 16, 2, 4, 2])
        weights = weights.permute([0, 1, 3, 2, 4]).reshape([ROWS, BLOCK_N])
        weights = gl.convert_layout(weights, layout, assert_trivial=True)
        # A cast would pack two and two, and then take them apart to pack four.
        return gl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            mov.b32 $0, {low, high};
            }""",
            "=r,r,r,r,r",
            [weights],
            dtype=gl.float8e4nv,
            is_pure=True,
            pack=4,
        )
    return gl.convert_layout(weights.to(dtype), layout)


@gluon.jit
def _weigh(logits, row_max, row_sums, scale_log2, MASKED: gl.constexpr, SHIFT: gl.constexpr):
    """Fold the logits of one tile into the running maximum [M] and sums [M, LANES].

    Weights, and so the sums, are 2^SHIFT times what they are called: the accumulator is, too. Sums
    stay with the threads that made them until the end, and are made in several chains at once: what
    is left of a softmax beside its exponentials is mostly waiting for the one before.
    """
    # scale_log2 is positive: the scaled maximum is the maximum scaled, and the subtraction below
    # becomes one fused multiply-add per logit.
    largest = gl.max(gl.max(over_columns(logits), 1), 1)
    new_max = gl.maximum(row_max, gl.convert_layout(largest, row_max.type.layout) * scale_log2)
    reference = new_max
    if MASKED:
        # A row that has seen no key yet has maximum -inf; -inf - -inf would be NaN.
        reference = gl.where(new_max == float("-inf"), 0.0, new_max)
    if SHIFT:
        weights = gl.exp2(logits * scale_log2 - (reference - SHIFT)[:, None])
    else:
        weights = gl.exp2(logits * scale_log2 - reference[:, None])
    decay = gl.exp2(row_max - reference)
    SUMS: gl.constexpr = row_sums.type.layout
    kept = row_sums * gl.convert_layout(decay, gl.SliceLayout(1, SUMS))[:, None]
    added = gl.convert_layout(gl.sum(over_columns(weights), 1), SUMS)
    return weights, decay, new_max, kept + added


@gluon.jit
def _tile_of(blocks, step, num_steps, PARTS: gl.constexpr):
    """Which BLOCK_N keys one step of a list of tiles takes; past the end those of the last."""
    step = gl.minimum(step, num_steps - 1)
    return gl.load(blocks + step // PARTS).to(gl.int32) * PARTS + step % PARTS


@gluon.jit
def _consume(
    group: gl.constexpr,
    work,
    rings,
    scales,
    HEAD_DIM: gl.constexpr,
    HAS_LOCAL_WINDOW: gl.constexpr,
    KEY_TILE: gl.constexpr,
):
    """One warpgroup: 64 rows over all tiles of the lists, then their output."""
    q_buffer, q_ready, k_buffers, v_buffers, k_ready, v_ready, k_free, v_free = rings
    num_window_steps, num_block_steps, windows, first_row, offset, num_queries = work[:6]
    num_init, num_local, scale_log2, out_base, out_stride, blocks = work[6:]
    ROWS: gl.constexpr = q_buffer.shape[2]
    BLOCK_N: gl.constexpr = k_buffers.shape[2]
    BLOCK_D: gl.constexpr = k_buffers.shape[3]
    STAGES: gl.constexpr = k_buffers.shape[0]
    PARTS: gl.constexpr = KEY_TILE // BLOCK_N
    dtype: gl.constexpr = q_buffer.dtype
    # The matrix instruction takes 32 bytes of either factor a step.
    EIGHT: gl.constexpr = dtype.primitive_bitwidth == 8
    STEP: gl.constexpr = 32 if EIGHT else 16
    SHIFT: gl.constexpr = _SHIFT if EIGHT else 0
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, STEP])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, STEP])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, STEP // 8)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)

    q = q_buffer.index(group).reshape([ROWS, BLOCK_D])
    rows = first_row + group * ROWS + gl.arange(0, ROWS, s_rows)
    positions = gl.where(rows < num_queries, rows + offset, -1)
    keys = gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    acc = gl.zeros([ROWS, BLOCK_D], gl.float32, o_layout)
    row_max = gl.full([ROWS], float("-inf"), gl.float32, s_rows)
    row_sums = gl.sum(over_columns(zeros), 1)  # [M, LANES]
    if EIGHT:
        k_scales, ordered_k_scales, q_scale, v_scales = scales
        scale_log2 *= gl.load(q_scale)
    mbarrier.wait(q_ready, 0)

    # 1. Windows in natural order, with the causal mask per token. They are few: no overlap.
    for step in range(num_window_steps):
        token = start_logits(q, k_buffers, k_ready, step, zeros)
        logits = warpgroup_mma_wait(0, deps=(token,))
        mbarrier.arrive(k_free.index(step % STAGES))
        start = gl.load(windows + step // PARTS) + step % PARTS * BLOCK_N
        key = start + keys
        tile_scale = scale_log2
        if EIGHT:
            tile_scale *= gl.load(k_scales + start // BLOCK_N)
        seen = key[None, :] <= positions[:, None]
        if HAS_LOCAL_WINDOW:
            near = positions[:, None] - key[None, :] < num_local
            seen = seen & ((key < num_init)[None, :] | near)
        logits = gl.where(seen, logits, float("-inf"))
        weights, decay, row_max, row_sums = _weigh(
            logits, row_max, row_sums, tile_scale, True, SHIFT
        )
        acc = acc * gl.convert_layout(decay, o_rows)[:, None]
        operand = _as_operand(weights, dtype, p_layout)
        token = _start_values(operand, v_buffers, v_ready, step, acc)
        acc = warpgroup_mma_wait(0, deps=(token,))
        mbarrier.arrive(v_free.index(step % STAGES))

    # 2. Tiles that every row sees, in plan order: no mask. They are whole, so all keys exist.
    if num_block_steps > 0:
        step = num_window_steps
        tile_scale = scale_log2
        if EIGHT:
            # Scales are asked for a step before they are used, and where they lie one before that:
            # nothing waits for memory.
            tile_scale *= gl.load(ordered_k_scales + _tile_of(blocks, 0, num_block_steps, PARTS))
            second = _tile_of(blocks, 1, num_block_steps, PARTS)
            next_scale = gl.load(ordered_k_scales + second)
            later_tile = _tile_of(blocks, 2, num_block_steps, PARTS)
        token = start_logits(q, k_buffers, k_ready, step, zeros)
        logits = warpgroup_mma_wait(0, deps=(token,))
        mbarrier.arrive(k_free.index(step % STAGES))
        weights, decay, row_max, row_sums = _weigh(
            logits, row_max, row_sums, tile_scale, False, SHIFT
        )
        acc = acc * gl.convert_layout(decay, o_rows)[:, None]
        if not EIGHT:
            weights = _as_operand(weights, dtype, p_layout)
        for step in range(num_window_steps + 1, num_window_steps + num_block_steps):
            s_token = start_logits(q, k_buffers, k_ready, step, zeros)
            if EIGHT:
                # Kept between steps they would be taken apart, byte by byte, and packed again.
                weights = _as_operand(weights, dtype, p_layout)
            o_token = _start_values(weights, v_buffers, v_ready, step - 1, acc)
            tile_scale = scale_log2
            if EIGHT:
                tile_scale *= next_scale
                next_scale = gl.load(ordered_k_scales + later_tile)
                ahead = step - num_window_steps + 2
                later_tile = _tile_of(blocks, ahead, num_block_steps, PARTS)
            logits = warpgroup_mma_wait(1, deps=(s_token,))
            mbarrier.arrive(k_free.index(step % STAGES))
            weights, decay, row_max, row_sums = _weigh(
                logits, row_max, row_sums, tile_scale, False, SHIFT
            )
            acc = warpgroup_mma_wait(0, deps=(o_token,))
            mbarrier.arrive(v_free.index((step - 1) % STAGES))
            acc = acc * gl.convert_layout(decay, o_rows)[:, None]
            if not EIGHT:
                weights = _as_operand(weights, dtype, p_layout)
        step = num_window_steps + num_block_steps - 1
        if EIGHT:
            weights = _as_operand(weights, dtype, p_layout)
        o_token = _start_values(weights, v_buffers, v_ready, step, acc)
        acc = warpgroup_mma_wait(0, deps=(o_token,))

    # A query without keys has sum 0 and accumulator 0: its output is 0.
    total = gl.convert_layout(gl.sum(row_sums, 1), o_rows)
    total = gl.where(total == 0.0, 1.0, total)
    out = acc / total[:, None]
    rows = first_row + group * ROWS + gl.arange(0, ROWS, o_rows)
    dims = gl.arange(0, BLOCK_D, gl.SliceLayout(0, o_layout))
    if EIGHT:
        out *= gl.load(v_scales + dims, mask=dims < HEAD_DIM, other=0.0)[None, :]
    out = out.to(out_base.dtype.element_ty)
    pointers = out_base + rows.to(gl.int64)[:, None] * out_stride + dims[None, :]
    gl.store(pointers, out, mask=(rows < num_queries)[:, None] & (dims < HEAD_DIM)[None, :])


@gluon.jit
def hopper_attention_fwd_kernel(
    q_descriptor,
    k_descriptor,
    v_descriptor,
    ordered_k_descriptor,
    ordered_v_descriptor,
    out_ptr,
    blocks_ptr,
    num_blocks_ptr,
    windows_ptr,
    num_windows_ptr,
    local_window_ptr,
    out_strides,
    blocks_strides,
    num_blocks_strides,
    windows_strides,
    num_windows_strides,
    scale_log2,
    scales,
    num_heads,
    num_kv_heads,
    num_order_heads,
    num_queries,
    num_keys,
    HEAD_DIM: gl.constexpr,
    QUERY_TILE: gl.constexpr,
    KEY_TILE: gl.constexpr,
    HAS_LOCAL_WINDOW: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One program: 128 rows of one query tile of one head, over all keys the plan names.

    Args:
        scales: of eight-bit tensors, contiguous: of q for every 128 rows, of k and of ordered k for
            every BLOCK_N keys, of v for every channel; None for others.
    """
    NUM_CONSUMERS: gl.constexpr = 2
    dtype: gl.constexpr = q_descriptor.dtype
    ROWS: gl.constexpr = q_descriptor.block_shape[1]
    BLOCK_N: gl.constexpr = k_descriptor.block_shape[1]
    BLOCK_D: gl.constexpr = k_descriptor.block_shape[2]
    barrier_layout: gl.constexpr = mbarrier.MBarrierLayout()

    # Later query tiles see more keys: start the longest programs first.
    part = gl.num_programs(0) - 1 - gl.program_id(0)
    batch = gl.program_id(1) // num_heads
    head = gl.program_id(1) % num_heads
    first_row = part * (NUM_CONSUMERS * ROWS)
    tile = first_row // QUERY_TILE
    batch64, head64 = batch.to(gl.int64), head.to(gl.int64)
    blocks = blocks_ptr + batch64 * blocks_strides[0] + head64 * blocks_strides[1]
    blocks += tile.to(gl.int64) * blocks_strides[2]
    windows = windows_ptr + batch64 * windows_strides[0] + head64 * windows_strides[1]
    windows += tile * windows_strides[2]
    counts = num_blocks_ptr + batch * num_blocks_strides[0] + head * num_blocks_strides[1]
    num_blocks = gl.load(counts + tile * num_blocks_strides[2])
    counts = num_windows_ptr + batch * num_windows_strides[0] + head * num_windows_strides[1]
    num_windows = gl.load(counts + tile * num_windows_strides[2])
    num_init = 0
    num_local = 0
    if HAS_LOCAL_WINDOW:
        num_init = gl.load(local_window_ptr + head * 2)
        num_local = gl.load(local_window_ptr + head * 2 + 1)

    q_buffer = gl.allocate_shared_memory(
        dtype, [NUM_CONSUMERS, 1, ROWS, BLOCK_D], q_descriptor.layout
    )
    k_buffers = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, BLOCK_D], k_descriptor.layout)
    V_ROWS: gl.constexpr = v_descriptor.block_shape[1]
    V_COLUMNS: gl.constexpr = v_descriptor.block_shape[2]
    v_buffers = gl.allocate_shared_memory(
        dtype, [STAGES, 1, V_ROWS, V_COLUMNS], v_descriptor.layout
    )
    q_ready = gl.allocate_shared_memory(gl.int64, [1], barrier_layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    mbarrier.init(q_ready, count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(slot), count=1)
        mbarrier.init(v_ready.index(slot), count=1)
        mbarrier.init(k_free.index(slot), count=NUM_CONSUMERS)
        mbarrier.init(v_free.index(slot), count=NUM_CONSUMERS)
    fence_async_shared()

    PARTS: gl.constexpr = KEY_TILE // BLOCK_N
    offset = num_keys - num_queries
    out_base = out_ptr + batch64 * out_strides[0] + head64 * out_strides[1]
    plane = batch * num_heads + head
    kv_plane = batch * num_kv_heads + head // (num_heads // num_kv_heads)
    order_plane = batch * num_order_heads + head // (num_heads // num_order_heads)
    tile_scales = ()
    if scales is not None:
        num_tiles = (num_keys + BLOCK_N - 1) // BLOCK_N
        tile_scales = (
            scales[1] + kv_plane * num_tiles,
            scales[2] + order_plane * num_tiles,
            scales[0] + plane * gl.num_programs(0) + part,
            scales[3] + kv_plane * HEAD_DIM,
        )
    rings = (q_buffer, q_ready, k_buffers, v_buffers, k_ready, v_ready, k_free, v_free)
    work = (
        num_windows * PARTS,
        num_blocks * PARTS,
        windows,
        first_row,
        offset,
        num_queries,
        num_init,
        num_local,
        scale_log2,
        out_base,
        out_strides[2],
        blocks,
    )
    tiles = (
        q_descriptor,
        k_descriptor,
        v_descriptor,
        ordered_k_descriptor,
        ordered_v_descriptor,
        blocks,
        num_blocks,
        windows,
        num_windows,
        plane,
        kv_plane,
        order_plane,
        first_row,
    )
    # A consumer needs 240 registers a thread: the loading warp gives its own away.
    gl.warp_specialize(
        [
            (_consume, (0, work, rings, tile_scales, HEAD_DIM, HAS_LOCAL_WINDOW, KEY_TILE)),
            (_consume, (1, work, rings, tile_scales, HEAD_DIM, HAS_LOCAL_WINDOW, KEY_TILE)),
            (_produce, (tiles, rings, KEY_TILE)),
        ],
        [4, 1],
        [240, 24],
    )

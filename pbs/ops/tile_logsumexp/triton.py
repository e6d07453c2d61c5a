"""Triton: a program holds some rows and passes over the tiles they see, each written once.

On Hopper, tiles of 128 keys in the dtypes of models go to :mod:`.triton_hopper` instead.

Legend: see :mod:`pbs.ops.grid`; M rows of a program, T keys of a step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pbs.ops.primitives import LOG2_E, finite, load_rows, offset
from pbs.ops.tile_logsumexp import triton_hopper
from pbs.ops.triton_hopper import for_descriptor

LN_2 = 1 / LOG2_E


@triton.jit
def _product(q, q_rest, k, SPLIT: tl.constexpr):
    """Logits [M, T] of rows and keys."""
    if SPLIT:
        # fp32 as a sum of two bf16: three products on matrix units, which leave out 2^-16 of it.
        high = k.to(tl.bfloat16)
        rest = (k - high.to(tl.float32)).to(tl.bfloat16)
        logits = tl.dot(q, tl.trans(high))
        logits = tl.dot(q_rest, tl.trans(high), logits)
        logits = tl.dot(q, tl.trans(rest), logits)
    else:
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
    return logits


@triton.jit
def write_tiles(
    sums_ptr,
    logits,
    places,
    is_row,
    start,
    num_tiles,
    ln_2,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The log-sum of each tile of base-2 logits [M, T]; masked ones: where a row sees any key."""
    BLOCK_M: tl.constexpr = logits.shape[0]
    WIDTH: tl.constexpr = logits.shape[1]
    logits = tl.reshape(logits, [BLOCK_M, WIDTH // TILE, TILE])
    largest = tl.max(logits, 2)  # [M, tiles]
    reference = largest
    if MASKED:
        reference = finite(largest)
    held = tl.sum(tl.exp2(logits - reference[:, :, None]), 2)
    value = (reference + tl.log2(tl.maximum(held, 1e-37))) * ln_2
    tiles = start // TILE + tl.arange(0, WIDTH // TILE)
    keep = is_row[:, None] & (tiles < num_tiles)[None, :]
    if MASKED:
        keep = keep & (held > 0.0)
    tl.store(sums_ptr + places[:, None] + tiles[None, :], value, mask=keep)


@triton.jit
def tile_logsumexp_kernel(
    rows_ptr,
    keys_ptr,
    natural_ptr,
    ends_ptr,
    until_ptr,
    sums_ptr,
    rows_strides,
    keys_strides,
    natural_strides,
    num_heads,
    num_rows,
    num_keys,
    num_tiles,
    scale_log2,
    ln_2,
    GROUP: tl.constexpr,
    NATURAL_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_NATURAL: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One program: some rows of one head."""
    plane = tl.program_id(1).to(tl.int64)
    batch, head = plane // num_heads, plane % num_heads
    # Later rows see more keys: the longest programs start first.
    part = tl.num_programs(0) - 1 - tl.program_id(0)
    rows = part * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    is_row = rows < num_rows
    dims = tl.arange(0, BLOCK_D)
    bounds = head * num_rows + rows
    ends = tl.load(ends_ptr + bounds, mask=is_row, other=0)
    q_base = rows_ptr + offset(rows_strides, batch, head)
    q = load_rows(q_base, rows, rows_strides[2], is_row, dims, HEAD_DIM)  # [M, D]
    rest = q
    if SPLIT:
        rest = (q - q.to(tl.bfloat16).to(tl.float32)).to(tl.bfloat16)
        q = q.to(tl.bfloat16)
    k_base = keys_ptr + offset(keys_strides, batch, head // GROUP)
    places = (plane * num_rows + rows) * num_tiles  # [M]
    first = tl.min(tl.where(is_row, ends, num_keys), 0) // WIDTH * WIDTH
    last = tl.max(ends, 0)
    # 1. Keys that all rows see: no mask. They are whole steps, so all keys exist.
    for start in range(0, first, WIDTH):
        tokens = start + tl.arange(0, WIDTH)  # [T]
        k = load_rows(k_base, tokens, keys_strides[2], tokens >= 0, dims, HEAD_DIM)  # [T, D]
        logits = _product(q, rest, k, SPLIT) * scale_log2  # [M, T]
        write_tiles(sums_ptr, logits, places, is_row, start, num_tiles, ln_2, TILE, False)
    # 2. Keys that some rows see; then those in natural order, from each row's end on.
    num_steps = tl.cdiv(last - first, WIDTH)
    num_moved = num_steps
    until = ends
    n_base = k_base
    if HAS_NATURAL:
        until = tl.load(until_ptr + bounds, mask=is_row, other=0)
        n_base = natural_ptr + offset(natural_strides, batch, head // NATURAL_GROUP)
        num_steps += tl.cdiv(tl.max(until, 0) - first, WIDTH)
    for step in range(0, num_steps):
        is_moved = step < num_moved
        start = first + tl.where(is_moved, step, step - num_moved) * WIDTH
        tokens = start + tl.arange(0, WIDTH)
        base = tl.where(is_moved, k_base, n_base)
        stride = tl.where(is_moved, keys_strides[2], natural_strides[2])
        k = load_rows(base, tokens, stride, tokens < num_keys, dims, HEAD_DIM)
        logits = _product(q, rest, k, SPLIT) * scale_log2
        low = tl.where(is_moved, 0, ends)
        high = tl.where(is_moved, ends, until)
        seen = (tokens[None, :] >= low[:, None]) & (tokens[None, :] < high[:, None])
        logits = tl.where(seen, logits, float("-inf"))
        write_tiles(sums_ptr, logits, places, is_row, start, num_tiles, ln_2, TILE, True)


def tile_logsumexp(
    rows: Tensor,
    keys: Tensor,
    ends: Tensor,
    *,
    tile: int,
    scale: float,
    natural: Tensor | None,
    until: Tensor | None,
) -> Tensor:
    """See :func:`pbs.ops.tile_logsumexp.api.tile_logsumexp`."""
    batch, num_heads, num_rows, head_dim = rows.shape
    num_keys = keys.shape[2]
    num_tiles = triton.cdiv(num_keys, tile)
    sums = rows.new_full(
        (batch, num_heads, num_rows, num_tiles), float("-inf"), dtype=torch.float32
    )
    others = keys if natural is None else natural
    rows, keys, others = (x if x.stride(3) == 1 else x.contiguous() for x in (rows, keys, others))
    ends = ends.int().contiguous()
    until = until if until is None else until.int().contiguous()
    capability = torch.cuda.get_device_capability(rows.device) if rows.is_cuda else (9, 0)
    sizes = {"element_size": rows.element_size(), "head_dim": head_dim, "tile": tile}
    if not triton.knobs.runtime.interpret and triton_hopper.takes(**sizes, capability=capability):
        rows, keys, others = (for_descriptor(x) for x in (rows, keys, others))
        triton_hopper.tile_logsumexp(
            rows, keys, ends, sums, scale=scale, natural=others, until=until
        )
        return sums
    block_m, width, num_warps = _sizes(rows.element_size(), head_dim, tile)
    tile_logsumexp_kernel[(triton.cdiv(num_rows, block_m), batch * num_heads)](
        rows,
        keys,
        others,
        ends,
        ends if until is None else until,
        sums,
        rows.stride(),
        keys.stride(),
        others.stride(),
        num_heads,
        num_rows,
        num_keys,
        num_tiles,
        scale * LOG2_E,
        LN_2,
        GROUP=num_heads // keys.shape[1],
        NATURAL_GROUP=num_heads // others.shape[1],
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_M=block_m,
        TILE=tile,
        WIDTH=width,
        HAS_NATURAL=natural is not None,
        SPLIT=rows.element_size() == 4 and not triton.knobs.runtime.interpret,
        num_warps=num_warps,
        maxnreg=128 if num_warps == 8 else None,  # two programs on a multiprocessor
        num_stages=2,
    )
    return sums


def _sizes(element_size: int, head_dim: int, tile: int) -> tuple[int, int, int]:
    """Rows of a program, keys of a step and warps, without spills (``make kernels``)."""
    if element_size == 4:
        return 64, max(tile, 64), 4
    if head_dim > 128:
        return 64, max(tile, 64), 4
    return 128, max(tile, 128), 8

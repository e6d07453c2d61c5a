"""Triton: a program holds the key tiles of one query tile and passes over its rows.

Legend: see :mod:`pbs.ops.grid`; T key tiles of a program.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pbs.ops.primitives import LOG2_E, finite

# Longest row that one program holds in registers, as for the selection.
MAX_KEY_TILES = 32768


@triton.jit
def _normaliser(x):
    """Base-2 logarithm of the sum over a row; +inf where it sees nothing, so that weights are 0."""
    largest = tl.max(x, 0)
    total = tl.sum(tl.exp2(x - finite(largest)), 0)
    return tl.where(total > 0.0, finite(largest) + tl.log2(tl.maximum(total, 1e-37)), float("inf"))


@triton.jit
def _row(sums_ptr, place, num_key_tiles, tiles, log2_e):
    base = sums_ptr + place.to(tl.int64) * num_key_tiles
    return tl.load(base + tiles, mask=tiles < num_key_tiles, other=float("-inf")) * log2_e


@triton.jit
def tile_masses_kernel(
    sums_ptr,
    smooth_ptr,
    counts_ptr,
    smooth_counts_ptr,
    limits_ptr,
    masses_ptr,
    num_rows,
    num_smooth,
    num_key_tiles,
    power,
    share,
    log2_e,
    BLOCK_T: tl.constexpr,
    HAS_SMOOTH: tl.constexpr,
):
    """One program: one query tile of one head."""
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tile
    tiles = tl.arange(0, BLOCK_T)  # [T]
    is_candidate = tiles < tl.load(limits_ptr + tile)
    count = tl.load(counts_ptr + tile)
    # 1. The largest mass: powers of small numbers vanish, so it is 1 first.
    largest = tl.full([], -100.0, tl.float32)  # of base-2 logarithms; 2^-100 is about 1e-30
    for i in range(0, count):
        x = _row(sums_ptr, row * num_rows + i, num_key_tiles, tiles, log2_e)
        held = tl.where(is_candidate, x, float("-inf"))
        largest = tl.maximum(largest, tl.max(held, 0) - _normaliser(x))
    # 2. Powers joined, and the plain total.
    joined = tl.zeros([BLOCK_T], tl.float32)
    total = tl.zeros([], tl.float32)
    for i in range(0, count):
        x = _row(sums_ptr, row * num_rows + i, num_key_tiles, tiles, log2_e)
        x = tl.where(is_candidate, x - _normaliser(x), float("-inf"))
        joined += tl.exp2(power * (x - largest))
        total += tl.sum(tl.exp2(x), 0)
    joined = tl.exp2(tl.log2(joined / count) / power)
    total /= count
    joined *= total / tl.maximum(tl.sum(joined, 0), 1e-30)
    # 3. The second probabilities.
    if HAS_SMOOTH:
        others = tl.zeros([BLOCK_T], tl.float32)
        count = tl.load(smooth_counts_ptr + tile)
        for i in range(0, count):
            x = _row(smooth_ptr, row * num_smooth + i, num_key_tiles, tiles, log2_e)
            others += tl.where(is_candidate, tl.exp2(x - _normaliser(x)), 0.0)
        joined = (1 - share) * joined + share * total * (others / tl.maximum(count, 1))
    tl.store(masses_ptr + row * num_key_tiles + tiles, joined, mask=tiles < num_key_tiles)


def tile_masses(
    sums: Tensor,
    counts: Tensor,
    limits: Tensor,
    *,
    power: float,
    smooth: Tensor | None,
    smooth_counts: Tensor | None,
    share: float,
) -> Tensor:
    """See :func:`pbs.ops.tile_masses.api.tile_masses`."""
    batch, num_heads, num_query_tiles, num_rows, num_key_tiles = sums.shape
    if num_key_tiles > MAX_KEY_TILES:
        raise NotImplementedError(
            f"masses of {num_key_tiles} key tiles: at most {MAX_KEY_TILES} are supported; use a "
            "larger block_size"
        )
    sums, counts = sums.contiguous(), counts.int().contiguous()
    second = sums if smooth is None else smooth.contiguous()
    masses = sums.new_empty(batch, num_heads, num_query_tiles, num_key_tiles)
    block_t = triton.next_power_of_2(num_key_tiles)
    tile_masses_kernel[(num_query_tiles, batch * num_heads)](
        sums,
        second,
        counts,
        counts if smooth_counts is None else smooth_counts.int().contiguous(),
        limits.int().contiguous(),
        masses,
        num_rows,
        second.shape[3],
        num_key_tiles,
        float(power),
        float(share),
        LOG2_E,
        BLOCK_T=block_t,
        HAS_SMOOTH=smooth is not None,
        num_warps=max(1, min(16, block_t // 256)),
    )
    return masses

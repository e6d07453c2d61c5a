"""One program per row: bisection for the threshold instead of a sort, lists written at once.

Legend: see :mod:`pbs.ops.grid`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Longest row that one program holds in registers: 64 a thread with 16 warps.
MAX_KEY_TILES = 32768


@triton.jit
def select_top_p_blocks_kernel(
    probabilities_ptr,
    candidates_ptr,
    limits_ptr,
    forced_ptr,
    blocks_ptr,
    counts_ptr,
    forced_strides,
    threshold,
    num_heads,
    num_query_tiles,
    num_key_tiles,
    BLOCK_T: tl.constexpr,
    HAS_FORCED: tl.constexpr,
    KEEPS_ALL: tl.constexpr,
):
    """One program: one query tile of one head."""
    row = tl.program_id(0).to(tl.int64)
    tile = row % num_query_tiles
    head = row // num_query_tiles % num_heads
    batch = row // num_query_tiles // num_heads
    tiles = tl.arange(0, BLOCK_T)  # [T]
    is_candidate = tiles < tl.load(candidates_ptr + tile)
    kept = is_candidate
    if not KEEPS_ALL:
        p = tl.load(probabilities_ptr + row * num_key_tiles + tiles, mask=is_candidate, other=0.0)
        # Bits of non-negative floats are ordered like the floats: find the smallest value v for
        # which what lies above it sums to less than the threshold.
        bits = p.to(tl.int32, bitcast=True)
        low = tl.full([], -1, tl.int32)
        high = tl.max(bits, 0)
        while high - low > 1:
            middle = low + (high - low) // 2
            above = tl.sum(tl.where(bits > middle, p, 0.0), 0)
            is_enough = above < threshold
            high = tl.where(is_enough, middle, high)
            low = tl.where(is_enough, low, middle)
        above = tl.sum(tl.where(bits > high, p, 0.0), 0)
        ties = (bits == high) & is_candidate
        rank = tl.cumsum(ties.to(tl.int32), 0) - 1
        value = high.to(tl.float32, bitcast=True)
        kept = (bits > high) | (ties & (above + rank * value < threshold))
        kept = kept & is_candidate
    if HAS_FORCED:
        forced = tl.load(forced_ptr + batch * forced_strides[0] + head * forced_strides[1])
        kept = kept | (tiles == forced)
    kept = kept & (tiles < tl.load(limits_ptr + tile))
    slots = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(blocks_ptr + row * num_key_tiles + slots, tiles, mask=kept)
    tl.store(counts_ptr + row, tl.sum(kept.to(tl.int32), 0))


@triton.jit
def list_blocks_kernel(mask_ptr, blocks_ptr, counts_ptr, num_key_tiles, BLOCK_T: tl.constexpr):
    """One program: one row."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, BLOCK_T)  # [T]
    kept = tl.load(mask_ptr + row * num_key_tiles + tiles, mask=tiles < num_key_tiles, other=0)
    kept = kept != 0
    slots = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(blocks_ptr + row * num_key_tiles + slots, tiles, mask=kept)
    tl.store(counts_ptr + row, tl.sum(kept.to(tl.int32), 0))


def list_blocks(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Lists as wide as the mask: their width needs no synchronisation."""
    mask = mask.contiguous()
    blocks = torch.empty_like(mask, dtype=torch.int32)
    counts = torch.empty(mask.shape[:-1], dtype=torch.int32, device=mask.device)
    _check_width(mask.shape[-1])
    block_t = triton.next_power_of_2(mask.shape[-1])
    list_blocks_kernel[(counts.numel(),)](
        mask.view(torch.uint8),
        blocks,
        counts,
        mask.shape[-1],
        BLOCK_T=block_t,
        num_warps=_num_warps(block_t),
    )
    return blocks, counts


def select_top_p_blocks(
    probabilities: Tensor,
    *,
    threshold: float,
    candidates: Tensor,
    limits: Tensor,
    forced: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`pbs.ops.block_selection.api.select_top_p_blocks`. No sort, no synchronisation."""
    batch, num_heads, num_query_tiles, num_key_tiles = probabilities.shape
    _check_width(num_key_tiles)
    probabilities = probabilities.contiguous()
    blocks = torch.empty_like(probabilities, dtype=torch.int32)
    counts = torch.empty(
        batch, num_heads, num_query_tiles, dtype=torch.int32, device=probabilities.device
    )
    stand_in = counts if forced is None else forced.expand(batch, num_heads)
    block_t = triton.next_power_of_2(num_key_tiles)
    select_top_p_blocks_kernel[(counts.numel(),)](
        probabilities,
        candidates.int(),
        limits.int(),
        stand_in,
        blocks,
        counts,
        stand_in.stride()[:2],
        threshold,
        num_heads,
        num_query_tiles,
        num_key_tiles,
        BLOCK_T=block_t,
        HAS_FORCED=forced is not None,
        KEEPS_ALL=threshold >= 1,
        num_warps=_num_warps(block_t),
    )
    return blocks, counts


def _check_width(num_key_tiles: int) -> None:
    if num_key_tiles > MAX_KEY_TILES:
        raise NotImplementedError(
            f"selection among {num_key_tiles} key blocks: at most {MAX_KEY_TILES} are supported; "
            "use a larger block_size"
        )


def _num_warps(block_t: int) -> int:
    return max(1, min(16, block_t // 256))

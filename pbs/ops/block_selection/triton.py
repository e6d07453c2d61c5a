"""One program per row: a search for the threshold instead of a sort, lists written at once.

Legend: see :mod:`pbs.ops.grid`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pbs.ops.grid import BlockGrid

# Longest row that one program holds in registers: 64 values a thread, 16 warps. Lists are int16.
MAX_KEY_TILES = 32768
# Logits of pooled blocks held at once: 2^23 fp32 values are 32 MB.
MAX_SCORES = 1 << 23


@triton.jit
def select_top_p_blocks_kernel(
    rows_ptr,
    candidates_ptr,
    limits_ptr,
    forced_ptr,
    covered_ptr,
    blocks_ptr,
    counts_ptr,
    forced_strides,
    scale,
    threshold,
    first_tile,
    num_heads,
    num_query_tiles,
    num_key_tiles,
    row_width,
    FORCED_GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_FORCED: tl.constexpr,
    HAS_COVERED: tl.constexpr,
    KEEPS_ALL: tl.constexpr,
    ARE_LOGITS: tl.constexpr,
):
    """One program: one query tile of one head; its row holds probabilities or logits."""
    tile = first_tile + tl.program_id(0)
    plane = tl.program_id(1).to(tl.int64)
    batch, head = plane // num_heads, plane % num_heads
    row = plane * num_query_tiles + tile
    tiles = tl.arange(0, BLOCK_T)  # [T]
    is_candidate = tiles < tl.load(candidates_ptr + tile)
    is_listed = tiles < tl.load(limits_ptr + tile)
    is_forced = tl.zeros_like(is_candidate)
    if HAS_FORCED:
        places = batch * forced_strides[0] + head // FORCED_GROUP * forced_strides[1]
        is_forced = tiles == tl.load(forced_ptr + places)
    kept = is_candidate
    if not KEEPS_ALL:
        place = (plane * tl.num_programs(0) + tl.program_id(0)) * row_width
        if ARE_LOGITS:
            x = tl.load(rows_ptr + place + tiles, mask=is_candidate, other=float("-inf")) * scale
            # A row without candidates has maximum -inf and sum 0; -inf - -inf would be NaN.
            p = tl.exp(x - tl.maximum(tl.max(x, 0), -3e38))
            p = p / tl.maximum(tl.sum(p, 0), 1e-37)
        else:
            p = tl.load(rows_ptr + place + tiles, mask=is_candidate, other=0.0)
        goal = threshold
        if HAS_COVERED:
            is_free = is_forced | (is_listed == 0)
            goal -= tl.load(covered_ptr + row) + tl.sum(tl.where(is_free, p, 0.0), 0)
            p = tl.where(is_free, 0.0, p)
        # Bits of non-negative floats are ordered like the floats: find the smallest value v for
        # which what lies above it sums to less than the goal.
        bits = p.to(tl.int32, bitcast=True)
        low = tl.full([], -1, tl.int32)
        high = tl.max(bits, 0)
        if ARE_LOGITS and threshold < 0.9999:
            # All values up to half of the mean of what may be left out sum to too little.
            least = (1.0 - threshold) * 0.5 / tl.maximum(tl.load(candidates_ptr + tile), 1)
            low = least.to(tl.float32).to(tl.int32, bitcast=True)
        while high - low > 1:
            middle = low + (high - low) // 2
            is_enough = tl.sum(tl.where(bits > middle, p, 0.0), 0) < goal
            high = tl.where(is_enough, middle, high)
            low = tl.where(is_enough, low, middle)
        above = tl.sum(tl.where(bits > high, p, 0.0), 0)
        ties = (bits == high) & is_candidate
        rank = tl.cumsum(ties.to(tl.int32), 0) - 1
        value = high.to(tl.float32, bitcast=True)
        kept = (bits > high) | (ties & (above + rank * value < goal))
        kept = kept & is_candidate
    kept = (kept | is_forced) & is_listed
    slots = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(blocks_ptr + row * num_key_tiles + slots, tiles.to(tl.int16), mask=kept)
    tl.store(counts_ptr + row, tl.sum(kept.to(tl.int32), 0))


@triton.jit
def list_blocks_kernel(mask_ptr, blocks_ptr, counts_ptr, num_key_tiles, BLOCK_T: tl.constexpr):
    """One program: one row."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, BLOCK_T)  # [T]
    kept = tl.load(mask_ptr + row * num_key_tiles + tiles, mask=tiles < num_key_tiles, other=0)
    kept = kept != 0
    slots = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(blocks_ptr + row * num_key_tiles + slots, tiles.to(tl.int16), mask=kept)
    tl.store(counts_ptr + row, tl.sum(kept.to(tl.int32), 0))


def list_blocks(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Lists as wide as the mask: their width needs no synchronisation."""
    mask = mask.contiguous()
    blocks, counts = _empty_lists(mask.shape, mask.device)
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
    covered: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`pbs.ops.block_selection.api.select_top_p_blocks`. No sort, no synchronisation."""
    lists = _empty_lists(probabilities.shape, probabilities.device)
    bounds = candidates.int(), limits.int(), forced
    if covered is not None:
        covered = covered.float().contiguous()
    rows = probabilities.contiguous()
    _select(rows, lists, bounds, 0, threshold=threshold, scale=None, covered=covered)
    return lists


def select_pooled_blocks(
    q_means: Tensor,
    k_means: Tensor,
    *,
    scale: float,
    threshold: float,
    candidates: Tensor,
    limits: Tensor,
    forced: Tensor | None,
    grid: BlockGrid | None,
) -> tuple[Tensor, Tensor]:
    """Some query blocks of all heads at a time, so that their logits stay in bounds."""
    batch, num_heads, num_query_tiles, _ = q_means.shape
    num_order_heads, num_key_tiles = k_means.shape[1:3]
    groups = num_heads // num_order_heads
    lists = _empty_lists((batch, num_heads, num_query_tiles, num_key_tiles), q_means.device)
    bounds = candidates.int(), limits.int(), forced
    if threshold >= 1:  # every candidate: nothing to rank
        rows = q_means.new_empty(batch, num_heads, num_query_tiles, 0)
        _select(rows, lists, bounds, 0, threshold=threshold, scale=scale)
        return lists
    grouped = q_means.unflatten(1, (num_order_heads, groups)).flatten(0, 1)  # [Z Ho, G, Tq, D]
    keys = k_means.flatten(0, 1).transpose(1, 2)  # [Z Ho, D, Tk]
    num_rows = max(1, MAX_SCORES // (batch * num_heads * num_key_tiles))
    for first in range(0, num_query_tiles, num_rows):
        chunk = grouped[:, :, first : first + num_rows]
        end = min(num_query_tiles, first + num_rows)
        width = num_key_tiles if grid is None else grid.num_causal_key_tiles(end)
        logits = torch.bmm(chunk.flatten(1, 2), keys[:, :, :width])  # [Z Ho, G rows, width]
        rows = logits.view(batch, num_heads, end - first, width)
        _select(rows, lists, bounds, first, threshold=threshold, scale=scale)
    return lists


def _select(
    rows: Tensor,
    lists: tuple[Tensor, Tensor],
    bounds: tuple[Tensor, Tensor, Tensor | None],
    first_tile: int,
    *,
    threshold: float,
    scale: float | None,
    covered: Tensor | None = None,
) -> None:
    """Write the lists of the query tiles from ``first_tile`` on, one per row of ``rows``.

    ``rows`` holds logits if there is a scale, else probabilities.
    """
    blocks, counts = lists
    candidates, limits, forced = bounds
    batch, num_heads, num_query_tiles, num_key_tiles = blocks.shape
    stand_in = counts if forced is None else forced.expand(batch, -1)
    block_t = triton.next_power_of_2(rows.shape[3] or num_key_tiles)
    select_top_p_blocks_kernel[(rows.shape[2], batch * num_heads)](
        rows,
        candidates,
        limits,
        stand_in,
        counts if covered is None else covered,
        blocks,
        counts,
        stand_in.stride()[:2],
        scale or 0.0,
        threshold,
        first_tile,
        num_heads,
        num_query_tiles,
        num_key_tiles,
        rows.shape[3],
        FORCED_GROUP=1 if forced is None else num_heads // forced.shape[1],
        BLOCK_T=block_t,
        HAS_FORCED=forced is not None,
        HAS_COVERED=covered is not None,
        KEEPS_ALL=threshold >= 1,
        ARE_LOGITS=scale is not None,
        num_warps=_num_warps(block_t),
    )


def _empty_lists(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Blocks int16 ``[..., Tk]`` and counts int32 ``[...]``."""
    if shape[-1] > MAX_KEY_TILES:
        raise NotImplementedError(
            f"selection among {shape[-1]} key blocks: at most {MAX_KEY_TILES} are supported; "
            "use a larger block_size"
        )
    blocks = torch.empty(shape, dtype=torch.int16, device=device)
    return blocks, torch.empty(shape[:-1], dtype=torch.int32, device=device)


def _num_warps(block_t: int) -> int:
    """Few: sums over a row that one warp holds need no barrier."""
    return max(1, min(16, block_t // 1024))

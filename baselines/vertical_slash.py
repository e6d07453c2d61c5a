"""Vertical lines and slashes: scores from the last queries, and the lists a kernel computes.

Legend: see :mod:`pbs.ops.grid`. R rows (heads of all sequences), o an offset (query position - key
position), m1 one past the last position of a query tile, L the last queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pbs.ops.block_selection import list_blocks
from pbs.ops.grid import BlockGrid
from pbs.ops.slash_windows import columns_outside, walk_windows

# Width of a slash's window and height of a query tile: a slash crosses one window in each tile.
TILE = 64
# Elements of a temporary per chunk of heads: 8 MB in fp32, 16 MB as indices. On a GPU, where small
# chunks cost more launches than work, 16 times that.
MAX_CHUNK_ELEMENTS = 1 << 21
MAX_CHUNK_ELEMENTS_GPU = 1 << 25


class VerticalSlashLists(NamedTuple):
    """``windows``, ``num_windows``, ``columns`` and ``num_columns`` of an AttentionPlan."""

    windows: Tensor
    num_windows: Tensor
    columns: Tensor
    num_columns: Tensor


def last_query_scores(
    q: Tensor, k: Tensor, *, scale: float, last_q: int = 64
) -> tuple[Tensor, Tensor]:
    """Attention that the last queries pay to each key and to each offset.

    With P = softmax(q_L kᵀ scale), causal: v[j] = Σ_r P[r, j] and u[o] = Σ_r P[r, position(r) - o].

    Args:
        q: ``[Z, Hq, Nq, D]``, after RoPE.
        k: ``[Z, Hkv, Nk, D]``, Nk >= Nq; queries are the last Nq tokens.
        scale: factor of the logits.
        last_q: L, how many of the last queries decide (all of them if there are fewer).

    Returns:
        Vertical and slash scores, both fp32 ``[Z, Hq, Nk]``. Of the [Hq, L, Nk] probabilities at
        most ``chunk_elements(q)`` exist at a time, but at least one head's.
    """
    batch, kv_heads, num_keys, _ = k.shape
    groups = q.shape[1] // kv_heads
    last_q = min(last_q, q.shape[2])
    queries = q[:, :, -last_q:].unflatten(1, (kv_heads, groups))
    keys = torch.arange(num_keys, device=q.device)
    future = keys > keys[num_keys - last_q :, None]  # [L, Nk]
    shape = (batch, kv_heads, groups, num_keys)
    vertical = torch.empty(shape, dtype=torch.float32, device=q.device)
    slash = torch.empty_like(vertical)
    chunk = max(1, chunk_elements(q) // (last_q * num_keys))
    for sequence in range(batch):
        for heads in _chunks(kv_heads, max(1, chunk // groups)):
            transposed = k[sequence, heads].float().transpose(-1, -2).unsqueeze(1)
            for members in _chunks(groups, chunk):
                logits = queries[sequence, heads, members].float() @ transposed * scale
                probabilities = logits.masked_fill_(future, float("-inf")).softmax(dim=-1)
                vertical[sequence, heads, members] = probabilities.sum(dim=-2)
                slash[sequence, heads, members] = _sum_by_offset(probabilities)
    return vertical.flatten(1, 2), slash.flatten(1, 2)


def keep_largest(scores: Tensor, counts: list[int]) -> Tensor:
    """The largest scores of each row; ties go to the lower index, on every device.

    Args:
        scores: ``[Z, H, ..., N]``.
        counts: how many to keep, one per head, each in [1, N].

    Returns:
        bool, shaped like ``scores``.
    """
    wanted = torch.tensor(counts, device=scores.device).view(-1, *[1] * (scores.ndim - 2))
    ranked = scores.topk(max(counts), dim=-1).values
    border = ranked.gather(-1, (wanted - 1).expand(*scores.shape[:-1], 1))
    above, level = scores > border, scores == border
    room = wanted - above.sum(dim=-1, keepdim=True)
    return above | (level & (level.cumsum(dim=-1) <= room))


def vertical_slash_lists(columns: Tensor, offsets: Tensor, grid: BlockGrid) -> VerticalSlashLists:
    """What each query tile computes for the chosen columns and offsets.

    In a tile that ends at m1 the slash o crosses the window of 64 keys that ends at
    max(m1 - o, 64). Windows are merged from the farthest on: with c the end of what is covered, the
    next window that ends past c is taken as it is if it lies past c + 64, else [c, c + 64) is. A
    column is computed where no window of the tile holds it.

    Args:
        columns: chosen keys, bool ``[Z, H, Nk]``.
        offsets: chosen offsets, bool ``[Z, H, Nk]``; offset 0, the query itself, is among them.
        grid: tiles of 64 x 64.

    Returns:
        The lists, int32 ``[Z, H, Tq, width]`` and ``[Z, H, Tq]``.

    Source: ``convert_vertical_slash_indexes`` of microsoft/MInference, which walks columns and
    offsets of one tile after the other. Here all tiles of all heads walk at once: seen from the
    tile's end, at the distance d = m1 - c, the next end is min(largest chosen offset below d,
    d - 64) whatever the tile, so that the walks are paths in one table and can be doubled.
    """
    lead = columns.shape[:2]
    windows, num_windows = _windows(offsets.flatten(0, 1), grid)
    kept, num_kept = _columns_outside(columns.flatten(0, 1), windows, num_windows, grid)
    parts = (windows, num_windows, kept, num_kept)
    return VerticalSlashLists(*(part.unflatten(0, lead) for part in parts))


def _sum_by_offset(probabilities: Tensor) -> Tensor:
    """Sums along the diagonals of ``[.., L, N]`` by offset ``[.., N]``; rows are the last L."""
    padded = torch.nn.functional.pad(probabilities, (probabilities.shape[-2] - 1, 0))
    # One element further in each row: a diagonal becomes a column.
    strides = (*padded.stride()[:-2], padded.shape[-1] + 1, 1)
    return padded.as_strided(probabilities.shape, strides).sum(dim=-2).flip(-1)


def _windows(offsets: Tensor, grid: BlockGrid) -> tuple[Tensor, Tensor]:
    """First keys of the merged windows, int32 ``[R, Tq, W]``, and counts, int32 ``[R, Tq]``."""
    # Places of the table are distances shifted by TILE - 1: an end may overshoot by that much.
    ends = grid.first_positions(offsets.device) + TILE
    table = _next_distances(offsets) + TILE - 1
    return walk_windows(table, ends, width=TILE, num_keys=grid.num_keys)


def _next_distances(offsets: Tensor) -> Tensor:
    """Distance of the next range end from the tile's end, for d = 1 - TILE .. Nk + TILE - 1.

    int64 ``[R, Nk + 2 TILE - 1]``. Ends at or past the tile's end (d <= 0) stay where they are.
    """
    padded = torch.nn.functional.pad(offsets, (0, TILE - 1))
    places = torch.arange(padded.shape[-1], device=offsets.device)
    largest = torch.where(padded, places, -1).cummax(dim=-1).values
    following = torch.minimum(largest, places + 1 - TILE)
    stay = torch.arange(1 - TILE, 1, device=offsets.device).expand(len(offsets), -1)
    return torch.cat([stay, following], dim=-1)


def _columns_outside(
    columns: Tensor, windows: Tensor, num_windows: Tensor, grid: BlockGrid
) -> tuple[Tensor, Tensor]:
    """Per tile the chosen columns that lie in none of its windows, and before its first query.

    Returns:
        int32 ``[R, Tq, C]`` and ``[R, Tq]``.
    """
    # The reference: as wide as the fullest row, where the GPU kernel would be as wide as the text.
    chosen, num_chosen = list_blocks(columns, backend="reference")
    first = grid.first_positions(columns.device)
    return columns_outside(chosen, num_chosen, windows, num_windows, first, width=TILE)


def chunk_elements(x: Tensor) -> int:
    """Elements of a temporary on x's device."""
    return MAX_CHUNK_ELEMENTS_GPU if x.is_cuda else MAX_CHUNK_ELEMENTS


def _chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` (at least 1) that together are ``range(count)``."""
    size = max(1, size)
    for begin in range(0, count, size):
        yield slice(begin, begin + size)

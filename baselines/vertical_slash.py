"""Vertical lines and slashes: scores from the last queries, and the lists a kernel computes.

Legend: see :mod:`pbs.ops.grid`. R rows (heads of all sequences), o an offset (query position - key
position), m1 one past the last position of a query tile, L the last queries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pbs.ops.block_selection import list_blocks
from pbs.ops.grid import BlockGrid
from pbs.ops.slash_windows import columns_outside, walk_windows

# Width of a slash's window and height of a query tile: a slash crosses one window in each tile.
TILE = 64


class VerticalSlashLists(NamedTuple):
    """``windows``, ``num_windows``, ``columns`` and ``num_columns`` of an AttentionPlan."""

    windows: Tensor
    num_windows: Tensor
    columns: Tensor
    num_columns: Tensor


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

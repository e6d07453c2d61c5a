"""Eager PyTorch: all walks at once, by doubling, and columns by a binary search in the windows.

Legend: see :mod:`pbs.ops.slash_windows.api`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of a temporary per chunk of rows: 8 MB in fp32, 16 MB as indices.
MAX_ELEMENTS = 1 << 21


def walk_windows(
    table: Tensor, ends: Tensor, *, width: int, num_keys: int
) -> tuple[Tensor, Tensor]:
    """See :func:`pbs.ops.slash_windows.api.walk_windows`."""
    shift = width - 1
    begin = (ends + shift).expand(len(table), -1)
    longest = -(-num_keys // width) + 1
    counts = _path_lengths(table, longest).gather(-1, begin).int()
    widest = int(counts.max())
    windows = torch.empty(len(table), len(ends), widest, dtype=torch.int32, device=table.device)
    slots = torch.arange(widest, device=table.device)
    for rows in _chunks(len(table), MAX_ELEMENTS // max(1, len(ends) * widest)):
        jump, path = table[rows], windows[rows]
        path[..., 0] = jump.gather(-1, begin[rows])
        filled = 1
        while filled < widest:  # `jump` takes `filled` steps at once
            more = min(filled, widest - filled)
            source = path[..., :more].long()
            path[..., filled : filled + more] = jump.gather(-1, source.flatten(1)).view_as(source)
            jump = jump.gather(-1, jump)
            filled += more
        starts = ends[:, None].int() - width - (path - shift)
        # The last window of a partial tile may begin past the last key.
        valid = (slots < counts[rows, :, None]) & (starts < num_keys)
        counts[rows] = valid.sum(dim=-1, dtype=torch.int32)
        windows[rows] = starts.masked_fill_(~valid, 0)
    return windows, counts


def _path_lengths(table: Tensor, longest: int) -> Tensor:
    """Steps from every place until it stays, by doubling; ``longest`` bounds them."""
    jump = table
    length = (table != torch.arange(table.shape[-1], device=table.device)).int()
    for _ in range(longest.bit_length()):
        length = length + length.gather(-1, jump)
        jump = jump.gather(-1, jump)
    return length


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
    # One slot more takes what is dropped.
    shape = (len(chosen), num_tiles, num_slots + 1)
    kept = torch.zeros(shape, dtype=torch.int32, device=chosen.device)
    counts = torch.zeros(shape[:2], dtype=torch.int32, device=chosen.device)
    real = torch.arange(num_slots, device=chosen.device) < num_chosen[:, None]
    slots = torch.arange(windows.shape[-1], device=chosen.device)
    far = torch.iinfo(torch.int32).max
    for rows in _chunks(len(chosen), MAX_ELEMENTS // (shape[1] * shape[2])):
        keys = chosen[rows, None].expand(-1, num_tiles, -1).contiguous()
        starts = windows[rows].masked_fill(slots >= num_windows[rows, :, None], far)
        place = torch.searchsorted(starts, keys, right=True) - 1
        nearest = starts.gather(-1, place.clamp(min=0))
        inside = (place >= 0) & (keys - nearest < width)
        keep = real[rows, None] & ~inside & (keys < first[:, None])
        counts[rows] = keep.sum(dim=-1, dtype=torch.int32)
        target = torch.where(keep, keep.cumsum(dim=-1) - 1, num_slots)
        kept[rows] = kept[rows].scatter_(-1, target, keys)
    return kept[..., : int(counts.max())], counts


def _chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` (at least 1) that together are ``range(count)``."""
    size = max(1, size)
    for begin in range(0, count, size):
        yield slice(begin, begin + size)

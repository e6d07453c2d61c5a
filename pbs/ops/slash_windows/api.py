"""Triton on a CUDA device, else eager PyTorch.

Legend: see :mod:`pbs.ops.grid`; R rows (heads of all sequences), W windows, C columns of a row.
"""

from __future__ import annotations

from torch import Tensor

from pbs.ops.backends import backend_module


def walk_windows(
    table: Tensor, ends: Tensor, *, width: int, num_keys: int, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The windows that each query tile meets on its way from key 0 to its end.

    A tile that ends at m1 begins at the distance m1 and goes from distance to distance by the
    row's table until that stays; at each distance d but the first stands the window of ``width``
    keys that ends at m1 - d + ``width``.

    Args:
        table: the next distance from each, shifted by ``width`` - 1 (so is the index), int64
            ``[R, Nk + 2 width - 1]``; never larger than the distance itself.
        ends: m1 of each query tile, int64 ``[Tq]``.
        width: keys of a window.
        num_keys: Nk; a window may begin past the last key, and is dropped.
        backend: "auto", "reference" or "triton".

    Returns:
        First keys, int32 ``[R, Tq, W]``, ascending, 0 past a row's count, and counts, int32
        ``[R, Tq]``. Waits for the device: W is the largest count.
    """
    found: tuple[Tensor, Tensor] = backend_module("slash_windows", backend, table).walk_windows(
        table, ends, width=width, num_keys=num_keys
    )
    return found


def columns_outside(
    chosen: Tensor,
    num_chosen: Tensor,
    windows: Tensor,
    num_windows: Tensor,
    first: Tensor,
    *,
    width: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Per query tile the chosen columns that lie in none of its windows, and before its first row.

    Args:
        chosen: keys, ascending, int ``[R, C]``.
        num_chosen: how many of a row count, int ``[R]``.
        windows: first keys, ascending, int32 ``[R, Tq, W]``.
        num_windows: how many of a tile count, int32 ``[R, Tq]``.
        first: position of each tile's first row, int64 ``[Tq]``.
        width: keys of a window.
        backend: "auto", "reference" or "triton".

    Returns:
        int32 ``[R, Tq, C']``, as wide as the fullest tile, and counts, int32 ``[R, Tq]``. Waits for
        the device.
    """
    found: tuple[Tensor, Tensor] = backend_module(
        "slash_windows", backend, windows
    ).columns_outside(chosen, num_chosen, windows, num_windows, first, width=width)
    return found

"""Eager PyTorch: the definition. Legend: see :mod:`pbs.ops.grid`."""

from __future__ import annotations

import torch
from torch import Tensor

from pbs.ops.permutation import gather_keys
from pbs.ops.quantisation.api import LARGEST, interleave, rotation, rotation_size, scale_of


def quantise_rows(
    x: Tensor, *, tile: int, order: Tensor | None, shift: Tensor | None, rotated: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`pbs.ops.quantisation.api.quantise_rows`."""
    rows = x.float()
    if shift is not None:
        rows = rows - shift.unsqueeze(2)
    if rotated:
        size = x.shape[3]
        rows = rows @ rotation(size, x.device) * rotation_size(size) ** -0.5
    if order is not None:
        rows = gather_keys(rows, order, backend="reference")
    num_tokens = rows.shape[2]
    tiles = _padded(rows, tile).unflatten(2, (-1, tile))
    scales = scale_of(tiles.abs().amax(dim=(3, 4)))
    eight = _to_eight(tiles * (1.0 / scales)[..., None, None]).flatten(2, 3)[:, :, :num_tokens]
    return eight.contiguous(), scales


def quantise_values(v: Tensor, scales: Tensor, *, tile: int, order: Tensor | None) -> Tensor:
    """See :func:`pbs.ops.quantisation.api.quantise_values`."""
    rows = v.float() * (1.0 / scales).unsqueeze(2)
    if order is not None:
        rows = gather_keys(rows, order, backend="reference")
    rows = _padded(rows, tile)
    rows = rows[:, :, interleave(rows.shape[2]).to(v.device)]
    return _to_eight(rows.transpose(2, 3)).contiguous()


def _padded(rows: Tensor, tile: int) -> Tensor:
    """With rows of zeros to a multiple of the tile."""
    return torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[2] % tile))


def _to_eight(x: Tensor) -> Tensor:
    # A product may come out above the limit by a rounding; the conversion would make it NaN.
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)

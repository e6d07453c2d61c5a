"""Blocks as their largest values. Legend: see :mod:`pbs.ops.grid`."""

from __future__ import annotations

import torch
from torch import Tensor

from pbs.ops.pooling.reference import split_tiles


def max_pool(x: Tensor, tile: int) -> Tensor:
    """Largest value of each dim in each tile of tokens, fp32 ``[Z, H, T, D]``."""
    whole, last = split_tiles(x, tile)
    largest = whole.amax(dim=3)
    if last is not None:
        largest = torch.cat([largest, last.amax(dim=2, keepdim=True)], dim=2)
    return largest.float()

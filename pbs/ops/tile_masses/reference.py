"""Eager PyTorch. Legend: see :mod:`pbs.ops.grid`; r rows of a tile."""

from __future__ import annotations

import torch
from torch import Tensor


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
    tiles = torch.arange(sums.shape[-1], device=sums.device)
    is_candidate = tiles < limits[:, None, None]  # [Tq, 1, Tk]
    masses = _power_mean(_weights(sums, is_candidate), counts, power)
    if smooth is None or smooth_counts is None:
        return masses
    total = masses.sum(dim=-1, keepdim=True)
    others = _of_rows(_weights(smooth, is_candidate), smooth_counts).sum(dim=3)
    others = others / smooth_counts[:, None]
    return (1 - share) * masses + share * total * others


def _weights(sums: Tensor, is_candidate: Tensor) -> Tensor:
    """Probabilities of the candidates; 0 in a row that sees nothing."""
    return sums.softmax(dim=-1).nan_to_num_().mul_(is_candidate)


def _of_rows(mass: Tensor, counts: Tensor) -> Tensor:
    rows = torch.arange(mass.shape[3], device=mass.device)
    return mass * (rows < counts[:, None])[..., None]


def _power_mean(mass: Tensor, counts: Tensor, power: float) -> Tensor:
    """Over the rows of ``[Z, Hq, Tq, r, Tk]`` that count, with the total of the plain mean."""
    mass = _of_rows(mass, counts)
    mean = mass.sum(dim=3) / counts[:, None]
    if power == 1:
        return mean
    # Powers of small numbers vanish: the largest is 1 first.
    largest = mass.amax(dim=(3, 4), keepdim=True).clamp(min=1e-30)
    joined = ((mass / largest).pow_(power).sum(dim=3) / counts[:, None]).pow_(1 / power)
    total = joined.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    return joined * (mean.sum(dim=-1, keepdim=True) / total)

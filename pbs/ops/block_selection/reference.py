"""Eager PyTorch: sort, cumulative sum, scatter. Legend: see :mod:`pbs.ops.grid`."""

from __future__ import annotations

import torch
from torch import Tensor

from pbs.ops.plan import compact


def select_top_p_blocks(
    probabilities: Tensor,
    *,
    threshold: float,
    candidates: Tensor,
    limits: Tensor,
    forced: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`pbs.ops.block_selection.api.select_top_p_blocks`."""
    tiles = torch.arange(probabilities.shape[-1], device=probabilities.device)
    mask = (tiles < candidates[:, None]).expand_as(probabilities)
    if threshold < 1:
        ranked, index = probabilities.sort(dim=-1, descending=True, stable=True)
        before = torch.nn.functional.pad(ranked.cumsum(dim=-1)[..., :-1], (1, 0))
        mask = torch.zeros_like(mask).scatter_(-1, index, before < threshold) & mask
    if forced is not None:
        mask = mask | (tiles == forced[..., None, None])
    return compact(mask & (tiles < limits[:, None]))

"""Eager PyTorch: sort, cumulative sum, scatter. Legend: see :mod:`pbs.ops.grid`."""

from __future__ import annotations

import torch
from torch import Tensor


def list_blocks(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Lists as wide as the fullest row."""
    counts = mask.sum(-1, dtype=torch.int32)
    width = int(counts.max()) if mask.numel() else 0
    slots = (mask.cumsum(-1, dtype=torch.int32) - 1).long()
    slots = torch.where(mask, slots, width)
    lists = torch.zeros(*mask.shape[:-1], width + 1, dtype=torch.int32, device=mask.device)
    indices = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device)
    lists.scatter_(-1, slots, indices.expand_as(mask))
    return lists[..., :width].contiguous(), counts


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
    return list_blocks(mask & (tiles < limits[:, None]))

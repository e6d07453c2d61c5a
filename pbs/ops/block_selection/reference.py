"""Eager PyTorch: sort, cumulative sum, scatter. Legend: see :mod:`pbs.ops.grid`."""

from __future__ import annotations

import torch
from torch import Tensor

from pbs.ops.grid import BlockGrid
from pbs.ops.pooling import block_logits, softmax_over


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


def select_top_p(
    probabilities: Tensor,
    *,
    threshold: float,
    candidates: Tensor,
    covered: Tensor | None = None,
) -> Tensor:
    """As a mask: the fewest key blocks, per query block, whose probability reaches the threshold.

    Args:
        probabilities: fp32 ``[Z, Hq, Tq, Tk]``; rows sum to 1 over the candidates.
        threshold: cumulative probability to reach (τ), in (0, 1]; 1 keeps every candidate.
        candidates: blocks that may be selected, bool ``[Tq, Tk]``.
        covered: what of each row counts towards the threshold already, fp32 ``[Z, Hq, Tq]``; rows
            then sum to 1 with it.

    Returns:
        Selected blocks, bool ``[Z, Hq, Tq, Tk]``. Ties go to the lower block index.
    """
    if threshold >= 1:
        return candidates.expand_as(probabilities)
    ranked, index = probabilities.sort(dim=-1, descending=True, stable=True)
    before = torch.nn.functional.pad(ranked.cumsum(dim=-1)[..., :-1], (1, 0))
    if covered is not None:
        before = before + covered.unsqueeze(-1)
    selected = torch.zeros_like(probabilities, dtype=torch.bool)
    selected.scatter_(-1, index, before < threshold)
    return selected & candidates


def select_top_p_blocks(
    probabilities: Tensor,
    *,
    threshold: float,
    candidates: Tensor,
    limits: Tensor,
    forced: Tensor | None,
    covered: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`pbs.ops.block_selection.api.select_top_p_blocks`."""
    tiles = torch.arange(probabilities.shape[-1], device=probabilities.device)
    is_candidate, is_listed = tiles < candidates[:, None], tiles < limits[:, None]
    is_forced = torch.zeros_like(tiles, dtype=torch.bool)
    if forced is not None:
        heads = probabilities.shape[1] // forced.shape[1]
        is_forced = tiles == forced.repeat_interleave(heads, dim=1)[..., None, None]
    if covered is not None:
        is_free = is_candidate & (is_forced | ~is_listed)
        covered = covered + probabilities.masked_fill(~is_free, 0.0).sum(-1)
        probabilities = probabilities.masked_fill(is_free, 0.0)
    mask = select_top_p(
        probabilities, threshold=threshold, candidates=is_candidate, covered=covered
    )
    return list_blocks((mask | is_forced) & is_listed)


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
    """See :func:`pbs.ops.block_selection.api.select_pooled_blocks`."""
    del grid  # all logits are computed
    tiles = torch.arange(k_means.shape[2], device=k_means.device)
    probabilities = softmax_over(
        block_logits(q_means, k_means) * scale, tiles < candidates[:, None]
    )
    return select_top_p_blocks(
        probabilities,
        threshold=threshold,
        candidates=candidates,
        limits=limits,
        forced=forced,
        covered=None,
    )

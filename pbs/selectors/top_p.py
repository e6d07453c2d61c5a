"""Selection by cumulative probability. Legend: see :mod:`pbs.ops.grid`."""

from __future__ import annotations

import torch
from torch import Tensor


def select_top_p(probabilities: Tensor, *, threshold: float, candidates: Tensor) -> Tensor:
    """Keep, per query block, the fewest key blocks whose probability reaches the threshold.

    Args:
        probabilities: fp32 ``[Z, Hq, Tq, Tk]``; rows sum to 1 over the candidates.
        threshold: cumulative probability to reach (τ), in (0, 1]; 1 keeps every candidate.
        candidates: blocks that may be selected, bool ``[Tq, Tk]``.

    Returns:
        Selected blocks, bool ``[Z, Hq, Tq, Tk]``. Ties go to the lower block index.

    Source: arXiv 2510.21270, section 3.3. A block is kept iff the sum *before* it is below τ, so a
    row whose rounded sum never reaches τ keeps all its blocks; the reference code drops them.
    """
    if threshold >= 1:
        return candidates.expand_as(probabilities)
    ranked, index = probabilities.sort(dim=-1, descending=True, stable=True)
    before = torch.nn.functional.pad(ranked.cumsum(dim=-1)[..., :-1], (1, 0))
    selected = torch.zeros_like(probabilities, dtype=torch.bool)
    selected.scatter_(-1, index, before < threshold)
    return selected & candidates

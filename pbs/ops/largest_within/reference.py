"""Eager PyTorch: sort and cumulative sum. R rows of N entries."""

from __future__ import annotations

import torch
from torch import Tensor


def largest_within(x: Tensor, goal: float) -> tuple[Tensor, Tensor]:
    """Border values, fp32 ``[R, 1]``, and how many equal ones, int64 ``[R, 1]``."""
    ranked = x.sort(dim=-1, descending=True).values
    count = (ranked.cumsum(dim=-1) <= goal).sum(dim=-1, keepdim=True)
    # Where none stays within the goal, none of those equal to the largest does.
    value = ranked.gather(-1, (count - 1).clamp(min=0))
    above = (x > value).sum(dim=-1, keepdim=True)
    return value, torch.where(count > 0, count - above, 0)

"""How many of the largest entries sum to no more than a goal, and which: a sort, or none on a GPU.

A sort of a row of 131072 entries, or of all blocks of a head, costs a GPU more than all else that
a selection does. There the value at which the sum passes the goal is searched for instead: floats
that are not negative are ordered like their bits, so that 31 comparisons and sums find it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Border:
    """Where the largest entries of each row end, ``[..., 1]``.

    Attributes:
        value: all larger entries belong to them.
        num_equal: and so many of those equal to it, from the lowest index on.
    """

    value: Tensor
    num_equal: Tensor

    def counts(self, x: Tensor) -> Tensor:
        """How many entries of each row belong to them, int64 ``[...]``."""
        return (x > self.value).sum(dim=-1) + self.num_equal.squeeze(-1)

    def mask(self, x: Tensor) -> Tensor:
        """Which, bool like ``x``."""
        level = x == self.value
        return (x > self.value) | (level & (level.cumsum(dim=-1) <= self.num_equal))


def find_border(x: Tensor, goal: float) -> Border:
    """The border of the most of the largest entries that sum to at most a goal.

    Args:
        x: not negative, fp32 ``[..., N]``.
        goal: not negative.
    """
    # Sums of the entries above `low` pass the goal (or low is -1), those above `high` do not.
    bits = x.view(torch.int32)
    high = bits.amax(dim=-1, keepdim=True)
    low = torch.full_like(high, -1)
    for _ in range(32):
        middle = low + torch.div(high - low, 2, rounding_mode="floor")
        fits = torch.where(bits > middle, x, 0.0).sum(dim=-1, keepdim=True) <= goal
        is_open = high - low > 1
        high = torch.where(is_open & fits, middle, high)
        low = torch.where(is_open & ~fits, middle, low)
    value = high.view(torch.float32)
    above = torch.where(x > value, x, 0.0).sum(dim=-1, keepdim=True)
    room = torch.where(value > 0, (goal - above) / value, float(x.shape[-1]))
    num_equal = (x == value).sum(dim=-1, keepdim=True)
    return Border(value, torch.minimum(room.clamp(min=0.0).long(), num_equal))


def count_within(x: Tensor, goal: float) -> Tensor:
    """How many of the largest entries of each row sum to at most a goal, int64 ``[...]``.

    Args:
        x: not negative, fp32 ``[..., N]``.
        goal: not negative.
    """
    if x.is_cuda:
        return find_border(x, goal).counts(x)
    ranked = x.sort(dim=-1, descending=True).values
    return (ranked.cumsum(dim=-1) <= goal).sum(dim=-1)


def mask_within(x: Tensor, goal: float) -> Tensor:
    """Which they are, bool like ``x``; ties to the lower index.

    Args:
        x: as for :func:`count_within`.
        goal: as there.
    """
    if x.is_cuda:
        return find_border(x, goal).mask(x)
    ranked, index = x.sort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, index, ranked.cumsum(dim=-1) <= goal)

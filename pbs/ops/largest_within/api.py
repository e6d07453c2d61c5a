"""Triton on a CUDA device, else eager PyTorch. N entries of a row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pbs.ops.backends import backend_module


class Border(NamedTuple):
    """Where the largest entries of each row end.

    Attributes:
        value: all larger entries belong to them, fp32 ``[..., 1]``.
        num_equal: and so many of those equal to it, from the lowest index on, int64 ``[..., 1]``.
    """

    value: Tensor
    num_equal: Tensor

    def counts(self, x: Tensor) -> Tensor:
        """How many entries of each row belong to them, int64 ``[...]``."""
        return (x > self.value).sum(dim=-1) + self.num_equal.squeeze(-1)

    def mask(self, x: Tensor) -> Tensor:
        """Which do, bool like ``x``."""
        level = x == self.value
        return (x > self.value) | (
            level & (level.cumsum(dim=-1, dtype=torch.int32) <= self.num_equal)
        )


def largest_within(x: Tensor, goal: float, *, backend: str = "auto") -> Border:
    """The border of the most of the largest entries of each row that sum to at most a goal.

    Args:
        x: not negative, fp32 ``[..., N]``.
        goal: not negative.
        backend: "auto", "reference" (a sort) or "triton" (a search for the border, without one).

    Raises:
        TypeError: another dtype than fp32.
    """
    if x.dtype != torch.float32:
        raise TypeError(f"expected x in fp32, got {x.dtype}")
    rows = x.reshape(-1, x.shape[-1])
    found = backend_module("largest_within", backend, x).largest_within(rows, goal)
    return Border(*(part.view(*x.shape[:-1], 1) for part in found))

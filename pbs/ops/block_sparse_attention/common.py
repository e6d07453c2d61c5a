"""What backends share. M queries, L keys, D head dim."""

from __future__ import annotations

import torch
from torch import Tensor

INF = float("inf")

# Of the two products: as the tensors are given, or in eight bits.
AS_GIVEN, FP8 = "as_given", "fp8"
PRECISIONS = (AS_GIVEN, FP8)
# Rows of q, and keys, that share a scale in eight bits: a program's, and a step's of its loop.
SCALED = 128
# What weights of at most 1 are multiplied by before they become e4m3, of 2^-9 to 448: it leaves 17
# powers of two to those that are smaller.
WEIGHT_SHIFT = 8
WEIGHT_SCALE = 2.0**WEIGHT_SHIFT


def weighted_values(weights: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """weights @ values, where a number that is not finite counts only for queries that see its key.

    In the product alone 0 * NaN and 0 * inf would reach every query.

    Args:
        weights: 0 where not seen, ``[.., M, L]``.
        values: ``[.., L, D]``.
        seen: bool ``[.., M, L]``.

    Returns:
        ``[.., M, D]``.
    """
    finite = values.isfinite()
    if bool(finite.all()):
        return weights @ values
    out = weights @ values.masked_fill(~finite, 0.0)
    for infinity in (INF, -INF):
        # NaN counts as both: inf - inf.
        reaches = seen.to(weights.dtype) @ (~finite & (values != -infinity)).to(weights.dtype)
        out = out + torch.where(reaches > 0, infinity, 0.0)
    return out

"""What eager backends share. M queries, L keys, D head dim."""

from __future__ import annotations

import torch
from torch import Tensor

INF = float("inf")


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

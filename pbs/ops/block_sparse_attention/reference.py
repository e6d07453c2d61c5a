"""Eager PyTorch: the definition of what a plan means. Legend: see :mod:`pbs.ops.grid`."""

from __future__ import annotations

import torch
from torch import Tensor

from pbs.ops.block_sparse_attention.common import weighted_values
from pbs.ops.plan import AttentionPlan


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float
) -> Tensor:
    """Masked softmax over the plan's token mask, in fp32 (fp64 for fp64 inputs); N x N memory."""
    groups = q.shape[1] // k.shape[1]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    k = k.repeat_interleave(groups, dim=1).to(compute)
    v = v.repeat_interleave(groups, dim=1).to(compute)
    mask = plan.token_mask()
    with torch.autocast(q.device.type, enabled=False):
        logits = q.to(compute) @ k.transpose(-1, -2) * scale
        logits = logits.masked_fill(~mask, float("-inf"))
        # A query without keys has only -inf: its softmax is NaN, its output is defined as 0.
        probabilities = logits.softmax(dim=-1).masked_fill(~mask, 0.0)
        return weighted_values(probabilities, v, mask).to(q.dtype)

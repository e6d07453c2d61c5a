"""Eager PyTorch: the definition of what a plan means. Legend: see :mod:`pbs.ops.grid`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pbs.ops.block_sparse_attention.common import (
    AS_GIVEN,
    FP8,
    SCALED,
    WEIGHT_SCALE,
    weighted_values,
)
from pbs.ops.block_sparse_attention.eight_bits import quantise_inputs
from pbs.ops.plan import AttentionPlan
from pbs.ops.quantisation import interleave


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float, precision: str = AS_GIVEN
) -> Tensor:
    """Masked softmax over the plan's token mask, in fp32 (fp64 for fp64 inputs); N x N memory."""
    if precision == FP8:
        return _in_eight_bits(q, k, v, plan, scale)
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


def _in_eight_bits(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """As a kernel with eight-bit factors and fp32 sums, but for the order of the sums.

    A kernel rounds weights relative to the largest logit so far, this to the largest of all.
    """
    eight = quantise_inputs(q, k, v, plan.order, backend="reference")
    q8, k8, v8, ordered_k8, _ = eight.tensors
    q_scales, k_scales, ordered_k_scales, v_scales = eight.scales
    queries = _restored(q8, q_scales)
    keys = _restored(k8, k_scales)
    ordered = _restored(ordered_k8, ordered_k_scales)
    if plan.order is not None:
        places = plan.order.unsqueeze(-1).expand_as(ordered)
        ordered = torch.empty_like(ordered).scatter_(2, places, ordered)
    places = interleave(v8.shape[3]).to(v.device).argsort()[: v.shape[2]]
    values = v8.float()[..., places].transpose(2, 3) * v_scales.unsqueeze(2)
    num_heads = q.shape[1]
    keys, ordered, values = (
        x.repeat_interleave(num_heads // x.shape[1], dim=1) for x in (keys, ordered, values)
    )
    mask = plan.token_mask()
    in_window = replace(plan, num_blocks=torch.zeros_like(plan.num_blocks)).token_mask()
    with torch.autocast(q.device.type, enabled=False):
        logits = torch.where(in_window, queries @ keys.mT, queries @ ordered.mT) * scale
        logits = logits.masked_fill(~mask, float("-inf"))
        largest = logits.amax(dim=-1, keepdim=True)
        weights = (logits - largest.nan_to_num(neginf=0.0)).exp()
        total = weights.sum(dim=-1, keepdim=True)
        rounded = (weights * WEIGHT_SCALE).to(torch.float8_e4m3fn).float() / WEIGHT_SCALE
        out = weighted_values(rounded, values, mask) / total.masked_fill(total == 0, 1.0)
    return out.to(q.dtype)


def _restored(eight: Tensor, scales: Tensor) -> Tensor:
    """Rows of eight bits times the scales of their tiles, fp32."""
    by_row = scales.repeat_interleave(SCALED, dim=2)[:, :, : eight.shape[2]]
    return eight.float() * by_row.unsqueeze(-1)

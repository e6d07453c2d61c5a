"""Dense attention: what every sparse method is measured against."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pbs.methods.base import AttentionMethod
from pbs.ops.grid import BlockGrid
from pbs.ops.inputs import check_attention_inputs
from pbs.ops.plan import AttentionPlan


@dataclass(kw_only=True)
class FlashAttention(AttentionMethod):
    """Full causal attention through PyTorch's SDPA. Density and coverage are 1."""

    def plan(
        self,
        q: Tensor,
        k: Tensor,
        *,
        scale: float | None = None,  # noqa: ARG002 - nothing is selected
        layer_idx: int | None = None,  # noqa: ARG002
    ) -> AttentionPlan:
        """Every causal tile."""
        check_attention_inputs(q, k)
        grid = BlockGrid(q.shape[2], k.shape[2], 128, 128)
        return AttentionPlan.dense(
            grid, q.shape[0], q.shape[1], device=q.device, reason="dense method"
        )

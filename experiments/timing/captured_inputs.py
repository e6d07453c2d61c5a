"""Queries, keys and values as a layer of a real model sees them, to time attention on.

Importable without hydra and wandb.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from experiments.timing.prefill_timing import first_token
from pbs.methods import AttentionMethod
from pbs.methods.base import Call
from pbs.ops.plan import AttentionPlan
from pbs.patch.huggingface import apply_patch_with_prefill


@dataclass(kw_only=True)
class _Capture(AttentionMethod):
    """Dense attention that keeps the inputs of one layer."""

    layer: int
    inputs: tuple[Tensor, Tensor, Tensor] | None = None
    _layer_idx: int | None = None

    def select(self, call: Call) -> AttentionPlan:
        self._layer_idx = call.layer_idx
        return call.dense("captured")

    def compute_dense(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        if self._layer_idx == self.layer:
            self.inputs = q.clone(), k.clone(), v.clone()
        return super().compute_dense(q, k, v, scale=scale)


def capture_inputs(
    model: PreTrainedModel, ids: Tensor, *, layer: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, after RoPE, of one layer of a model in a prefill of ids ``[1, N]``.

    Raises:
        ValueError: the model has no such layer.
    """
    method = _Capture(layer=layer)
    with apply_patch_with_prefill(model, method):
        first_token(model, ids)
    if method.inputs is None:
        raise ValueError(f"layer {layer} was not called; layers are counted from 0")
    return method.inputs

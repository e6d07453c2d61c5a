"""One attention call of a model, copied, and which of its heads to show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pbs.methods.base import AttentionMethod, CallRecord
from pbs.ops.plan import AttentionPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class CapturedCall:
    """One attention call of a model, copied.

    Attributes:
        layer_idx: the layer.
        q: ``[Z, Hq, Nq, D]``, after RoPE.
        k: ``[Z, Hkv, Nk, D]``.
        scale: factor of the logits.
        plan: what the method computed.
    """

    layer_idx: int
    q: Tensor
    k: Tensor
    scale: float
    plan: AttentionPlan


def capture_call(
    model: PreTrainedModel, input_ids: Tensor, method: AttentionMethod, *, layer: int
) -> CapturedCall:
    """As :func:`capture_calls`, for one layer."""
    return capture_calls(model, input_ids, method, layers=[layer])[0]


def capture_calls(
    model: PreTrainedModel, input_ids: Tensor, method: AttentionMethod, *, layers: Sequence[int]
) -> list[CapturedCall]:
    """Run a prompt through the model under a method and copy what some layers' calls saw.

    The model's attention and the method's recorder are restored.

    Args:
        model: the model, not patched.
        input_ids: one prompt without padding, int ``[1, N]`` or ``[N]``, N at least 2.
        method: what takes the place of attention.
        layers: whose calls to copy.

    Returns:
        One call per layer, in the order of ``layers``.

    Raises:
        ValueError: not one prompt, or the method was never called for one of the layers.
    """
    from pbs.patch.huggingface import apply_patch_with_prefill

    if input_ids.ndim == 1:
        input_ids = input_ids[None]
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 2:
        raise ValueError(
            f"expected one prompt of two or more tokens [1, N], got shape {tuple(input_ids.shape)}"
        )
    captured: dict[int, CapturedCall] = {}
    seen: set[int] = set()

    def record(call: CallRecord) -> None:
        if call.layer_idx is None:
            return
        seen.add(call.layer_idx)
        if call.layer_idx in layers:
            q, k = call.q.detach().clone(), call.k.detach().clone()
            # Without the gathered keys, which are as large as k times the query heads per KV head.
            plan = replace(call.plan, ordered_keys=None)
            captured[call.layer_idx] = CapturedCall(call.layer_idx, q, k, call.scale, plan)

    recorder, method.recorder = method.recorder, record
    try:
        with apply_patch_with_prefill(model, method) as patched, torch.no_grad():
            patched(input_ids=input_ids.to(patched.device), use_cache=False, logits_to_keep=1)
    finally:
        method.recorder = recorder
    for layer in layers:
        if layer not in captured:
            raise ValueError(
                f"the method was not called for layer {layer}, only for {sorted(seen)}; skipped "
                "and special layers are not its own"
            )
    return [captured[layer] for layer in layers]


def choose_head(captured: CapturedCall, plan_before: AttentionPlan | None = None) -> int:
    """The query head of the first sequence that shows best what the permutation does.

    With ``plan_before`` (the same method without the permutation) the head whose density drops
    most. Without it the head with the strongest vertical lines: the largest share of attention that
    64 queries, evenly spread over the later half, give on average to the most attended 1 % of the
    keys that all of them see. Token 0 does not count, nor do the 256 keys before these queries (in
    prompts of fewer than 1024 tokens the second half of the keys they all see): all heads attend to
    them. Without keys to count it is head 0.

    Args:
        captured: the call.
        plan_before: a plan for the same tensors.
    """
    if plan_before is not None:
        return int((plan_before.density()[0] - captured.plan.density()[0]).argmax())
    q, k = captured.q[0], captured.k[0]
    num_queries, offset = q.shape[1], k.shape[1] - q.shape[1]
    rows = torch.linspace(num_queries // 2, num_queries - 1, 64, device=q.device).long().unique()
    first = int(rows[0]) + offset
    num_candidates = max(first - 256, first // 2)
    if num_candidates < 2:
        return 0
    strengths = []
    for head in range(q.shape[0]):
        keys = k[head // (q.shape[0] // k.shape[0])]
        weights = causal_probabilities(q[head, rows], keys, rows + offset, captured.scale)
        means = weights[:, 1:num_candidates].mean(dim=0)
        strengths.append(float(means.topk(max(1, num_candidates // 100)).values.sum()))
    return int(np.argmax(strengths))


def choose_heads(plan: AttentionPlan, plan_before: AttentionPlan | None, count: int) -> list[int]:
    """Query heads of the first sequence for a gallery, from most to least tiles saved.

    Args:
        plan: with the permutation.
        plan_before: without it; None: by density alone, densest first.
        count: how many, evenly spread over the ranking, both ends among them.
    """
    saved = plan.density()[0]
    if plan_before is not None:
        saved = plan_before.density()[0] - saved
    ranking = saved.argsort(descending=True, stable=True).tolist()
    count = min(count, len(ranking))
    places = torch.linspace(0, len(ranking) - 1, count).round().long().tolist()
    return [ranking[place] for place in places]


def causal_probabilities(q: Tensor, k: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Causal attention probability in fp32, ``[R, Nk]`` from q ``[R, D]`` and k ``[Nk, D]``."""
    logits = q.float() @ k.float().T * scale
    return logits.masked_fill_(future_keys(logits, positions), float("-inf")).softmax(dim=1)


def future_keys(weights: Tensor, positions: Tensor) -> Tensor:
    """Keys after each row's position, bool ``[R, Nk]``."""
    return torch.arange(weights.shape[1], device=weights.device) > positions[:, None]

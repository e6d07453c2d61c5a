"""Times whole prefills: from token ids to the first token, any causal language model.

Importable without hydra and wandb.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from experiments.controlled_density import ControlledDensity
from experiments.dense_kernels import SDPA_BACKENDS, dense_backend
from experiments.exact_rows import RowCheck, check_rows
from experiments.timing import (
    VARIANT_ERRORS,
    Effort,
    Failure,
    is_out_of_memory,
    peak_memory,
    poisoned_memory,
    release_memory,
    time_interleaved,
)
from pbs.methods import AttentionMethod, CallRecord, build_method
from pbs.ops.block_sparse_attention import block_sparse_attention
from pbs.ops.grid import BlockGrid
from pbs.ops.plan import AttentionPlan
from pbs.ops.stages import StageTimer
from pbs.patch.huggingface import apply_patch_with_prefill, get_patch

logger = logging.getLogger(__name__)

Record = dict[str, Any]

# Largest distance of the last token's logits between dense kernels in half precision.
MAX_DENSE_DISTANCE = 0.1


def measure_prefill(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    methods: Mapping[str, AttentionMethod],
    dense: Sequence[str],
    *,
    effort: Effort,
    density: float | None = None,
    takes_stages: bool = True,
) -> Record:
    """Check, then time, the first token of prompts of one length.

    Args:
        model: not patched; left as it was found.
        prompts: token ids ``[1, N]`` on the model's device; calls take turns over them.
        methods: by label.
        dense: names of kernels. Those that PyTorch's SDPA has run in the model's own attention,
            without our patch; packages run as the method "flash".
        effort: how long to time, all variants together.
        density: every method computes this share of the tiles; None: what it selects itself.
        takes_stages: take one more call of each method apart.

    Returns:
        "length", "target_density", and by name under "dense" and "methods": times in ms with all
        samples, peak memory, for methods density, layers that ran sparse, stages (sums over the
        layers) and speed-ups.
    """
    length = prompts[0].shape[1]
    record: Record = {"length": length, "target_density": density, "dense": {}, "methods": {}}
    if density is not None:
        methods = {
            label: ControlledDensity(method=method, target_density=density)
            for label, method in methods.items()
        }
    places: dict[str, Callable[[], AbstractContextManager[Any]]] = {}
    for name in dense:
        places[f"dense {name}"] = _dense_place(model, name)
    for label, method in methods.items():
        places[f"method {label}"] = partial(apply_patch_with_prefill, model, method)
    facts: dict[str, Record | Failure] = {}
    own: Tensor | None = None
    for name, place in places.items():
        label = name.partition(" ")[2]
        method = methods[label] if name.startswith("method") else None
        facts[name], logits = _examine(model, prompts[0], place, method, own)
        own = logits if own is None and method is None else own
    runs = {
        name: partial(_take_turn, model, prompts)
        for name in places
        if not isinstance(facts[name], Failure)
    }
    device = model.device
    times = time_interleaved(
        runs,
        device=device,
        effort=effort,
        around=places,
        seconds_per_round=sum(facts[name]["first_ms"] for name in runs) / 1e3,
    )
    for name, place in places.items():
        kind, _, label = name.partition(" ")
        found = facts[name]
        result = found if isinstance(found, Failure) else times[name]
        entry = {**result.to_dict(), **({} if isinstance(found, Failure) else found)}
        if takes_stages and kind == "method" and entry.get("num_sparse_layers"):
            entry["stages_ms"] = _stages(model, prompts[0], place)
        record["dense" if kind == "dense" else "methods"][label] = entry
    _derive(record)
    release_memory()
    return record


def first_token(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits ``[V]`` of the token after the prompt, with a filled cache as in generation."""
    with torch.inference_mode():
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        # Reading the token is what a server waits for.
        out.logits[0, -1].argmax().item()
        return out.logits[0, -1]


@dataclass(kw_only=True)
class _Capture(AttentionMethod):
    """Dense attention that keeps the inputs of one layer."""

    layer: int
    inputs: tuple[Tensor, Tensor, Tensor] | None = None
    _layer_idx: int | None = None

    def plan(
        self,
        q: Tensor,
        k: Tensor,
        *,
        scale: float | None = None,  # noqa: ARG002 - nothing is selected
        layer_idx: int | None = None,
    ) -> AttentionPlan:
        self._layer_idx = layer_idx
        grid = BlockGrid(q.shape[2], k.shape[2], 128, 128)
        return AttentionPlan.dense(grid, q.shape[0], q.shape[1], device=q.device, reason="captured")

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


def _take_turn(model: PreTrainedModel, prompts: Sequence[Tensor], index: int) -> None:
    first_token(model, prompts[index % len(prompts)])


def _dense_place(model: PreTrainedModel, name: str) -> Callable[[], AbstractContextManager[Any]]:
    if name == "cpu" or name in SDPA_BACKENDS:
        return partial(dense_backend, name)
    return partial(apply_patch_with_prefill, model, build_method("flash", kernel=name))


def _examine(
    model: PreTrainedModel,
    ids: Tensor,
    place: Callable[[], AbstractContextManager[Any]],
    method: AttentionMethod | None,
    own: Tensor | None,
) -> tuple[Record | Failure, Tensor | None]:
    """The gate and peak memory of one variant, and its logits; a Failure stops its timing."""
    found: Record = {}
    failure = None
    checks: list[RowCheck] = []
    try:
        with place():
            if method is not None:
                found |= _check_kernel(model, ids, method, checks)
                if checks and not checks[0].passed:
                    return Failure("incorrect", str(checks[0])), None
            else:
                first_token(model, ids[:, : min(256, ids.shape[1])])  # compiles, loads
            with peak_memory(model.device) as peak:
                started = time.perf_counter()
                logits = first_token(model, ids)
                found["first_ms"] = 1e3 * (time.perf_counter() - started)
            if method is not None:
                found |= _describe(model)
        found["peak_bytes"] = peak.num_bytes
        if not bool(logits.isfinite().all()):
            return Failure("incorrect", "logits are not finite"), None
        if method is None and own is not None:
            distance = float((logits - own).double().norm() / own.double().norm())
            found["distance_to_first_dense"] = distance
            if distance > MAX_DENSE_DISTANCE:
                return Failure("incorrect", f"logits differ by {distance:.3g} from dense"), None
        return found, logits.clone()
    except VARIANT_ERRORS as error:
        is_refusal = method is None or isinstance(error, NotImplementedError)
        kind = "unavailable" if is_refusal else "error"
        failure = Failure.of(error, "out of memory" if is_out_of_memory(error) else kind)
        if failure.kind == "error":
            logger.warning("a variant failed and gets no time: %s", error, exc_info=True)
    release_memory(collects=True)  # after the handler: the traceback holds tensors
    return failure, None


def _check_kernel(
    model: PreTrainedModel, ids: Tensor, method: AttentionMethod, checks: list[RowCheck]
) -> Record:
    """Run the prompt once; the first sparse call's kernel runs again, keys as values, and counts.

    This is also the warm-up: kernels are compiled and lists drawn afterwards.
    """

    def examine(call: CallRecord) -> None:
        if checks or call.plan.is_dense or call.q.shape[2] == 1:
            return
        with poisoned_memory(call.q.device, call.q.nbytes):
            out = block_sparse_attention(
                call.q, call.k, call.k, call.plan, scale=call.scale, backend=method.backend
            )
        heads = sorted({0, call.q.shape[1] - 1})
        checks.append(
            check_rows(out, call.q, call.k, call.k, call.plan, scale=call.scale, heads=heads)
        )

    method.recorder = examine
    try:
        first_token(model, ids)
    finally:
        method.recorder = None
        get_patch(model).reset()
    if not checks:
        return {"rows_checked": 0}
    return {
        "error": checks[0].error,
        "allowed_error": checks[0].allowed,
        "relative_error": checks[0].relative,
        "rows_checked": checks[0].num_rows,
    }


def _describe(model: PreTrainedModel) -> Record:
    report = get_patch(model).report()
    return {
        "density": report.density,
        "num_layers": len(report.layers),
        "num_sparse_layers": report.num_sparse_layers,
        "dense_calls": report.dense_calls,
    }


def _stages(
    model: PreTrainedModel, ids: Tensor, place: Callable[[], AbstractContextManager[Any]]
) -> dict[str, float]:
    """Milliseconds of each stage of one prefill, summed over the layers."""
    with place(), StageTimer(model.device) as timer:
        first_token(model, ids)
    return timer.milliseconds()


def _derive(record: Record) -> None:
    known = {
        name: entry["median_ms"]
        for name, entry in record["dense"].items()
        if entry["median_ms"] is not None
    }
    fastest = min(known, key=lambda name: known[name]) if known else None
    record["fastest_dense"] = fastest
    for entry in record["methods"].values():
        if entry["median_ms"] is None:
            continue
        entry["speed_up"] = {name: ms / entry["median_ms"] for name, ms in known.items()}
        entry["speed_up_over_fastest"] = entry["speed_up"].get(fastest) if fastest else None
        # So that both levels have the same columns.
        entry["dense_reason"] = "" if entry["num_sparse_layers"] else "no layer ran sparse"

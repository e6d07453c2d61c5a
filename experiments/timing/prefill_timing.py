"""Times whole prefills: from token ids to the first token, any causal language model.

Importable without hydra and wandb.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from experiments.gate.rows import RowCheck, check_rows
from experiments.machine_load import LoadMeter
from experiments.memory import (
    peak_memory,
    poisoned_memory,
    release_memory,
)
from experiments.models.tensor_parallel import COMMUNICATION, timed_collectives
from experiments.settings.ranks import (
    gather_over_ranks,
    is_shared,
    mean_over_ranks,
    num_ranks,
    rank,
)
from experiments.timing.cost_model import Rates
from experiments.timing.dense_kernels import SDPA_BACKENDS, dense_backend
from experiments.timing.densities import ControlledDensity
from experiments.timing.prefill_ratios import add_prefill_ratios, architecture_of, cannot_fit
from experiments.timing.stopwatch import (
    VARIANT_ERRORS,
    Effort,
    Failure,
    time_interleaved,
)
from pbs.methods import AttentionMethod, CallRecord, build_method
from pbs.ops.block_sparse_attention import block_sparse_attention
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
    rates: Rates | None = None,
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
        rates: of one device, for floors.
        takes_stages: take one more call of each method apart.

    Returns:
        "length", "target_density", and by name under "dense" and "methods": times in ms with all
        samples, the first token, peak memory, floors, for methods density, layers that ran sparse,
        stages (sums over the layers) and speed-ups. Where several processes share the model, the
        density is the mean over all heads, and memory of each process and the share of the time
        that goes into communication are there too; all processes must call this alike.
    """
    length = prompts[0].shape[1]
    record: Record = {"length": length, "target_density": density, "dense": {}, "methods": {}}
    if is_shared():
        record["num_ranks"] = num_ranks()
    if density is not None:
        methods = {
            label: ControlledDensity(method=method, target_density=density, rank=rank())
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
    meter = LoadMeter()
    times = time_interleaved(
        runs,
        device=model.device,
        effort=effort,
        around=places,
        earlier_ms={name: facts[name]["first_ms"] for name in runs},
    )
    record["load"] = meter.lap()
    for name, place in places.items():
        kind, _, label = name.partition(" ")
        found = facts[name]
        result = found if isinstance(found, Failure) else times[name]
        entry = {**result.to_dict(), **({} if isinstance(found, Failure) else found)}
        is_sparse = kind == "method" and entry.get("num_sparse_layers")
        if takes_stages and entry["median_ms"] is not None and (is_sparse or is_shared()):
            entry |= _stages(model, prompts[0], place)
        record["dense" if kind == "dense" else "methods"][label] = entry
    add_prefill_ratios(record, methods, architecture_of(model), rates)
    release_memory()
    return record


def first_token(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits ``[V]`` of the token after the prompt, with a filled cache as in generation."""
    with torch.inference_mode():
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        # Reading the token is what a server waits for.
        out.logits[0, -1].argmax().item()
        return out.logits[0, -1]


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
    """The gate and peak memory of one variant, and its logits; a Failure stops its timing.

    Where several processes share the model, the failure of one is the failure of all.
    """
    lack = cannot_fit(model, ids.shape[1], method)
    if any(gather_over_ranks(lack is not None)):
        return Failure("does not fit", lack or "does not fit into another process's device"), None
    found, logits = _examine_here(model, ids, place, method, own)
    everywhere = gather_over_ranks(found)
    for one in everywhere:
        if isinstance(one, Failure):
            return one, None
    assert isinstance(found, dict)
    if is_shared():
        found["peak_bytes_by_rank"] = [one["peak_bytes"] for one in everywhere]
        found["total_bytes_by_rank"] = [one["total_bytes"] for one in everywhere]
        found["first_ms"] = max(one["first_ms"] for one in everywhere)
        if method is not None:
            densities = [one["density"] for one in everywhere]
            (found["density"],) = mean_over_ranks([found["density"]])
            found["density_by_rank"] = densities
    return found, logits


def _examine_here(
    model: PreTrainedModel,
    ids: Tensor,
    place: Callable[[], AbstractContextManager[Any]],
    method: AttentionMethod | None,
    own: Tensor | None,
) -> tuple[Record | Failure, Tensor | None]:
    """:func:`_examine` as this process sees it."""
    found: Record = {}
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
        found["first_token"] = int(logits.argmax())
        found |= {"peak_bytes": peak.num_bytes, "total_bytes": peak.total_bytes}
        if not bool(logits.isfinite().all()):
            return Failure("incorrect", "logits are not finite"), None
        if method is None and own is not None:
            distance = float((logits - own).double().norm() / own.double().norm())
            found["distance_to_first_dense"] = distance
            if distance > MAX_DENSE_DISTANCE:
                return Failure("incorrect", f"logits differ by {distance:.3g} from dense"), None
        return found, logits.clone()
    except VARIANT_ERRORS as error:
        failure = Failure.of_variant(error, is_dense=method is None)
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
        settings = {"scale": call.scale, "precision": method.precision}
        inputs = call.q, call.k, call.k, call.plan
        with poisoned_memory(call.q.device, call.q.nbytes):
            out = block_sparse_attention(*inputs, backend=method.backend, **settings)
        heads = sorted({0, call.q.shape[1] - 1})
        checks.append(check_rows(out, *inputs, heads=heads, **settings))

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
) -> Record:
    """Milliseconds of each stage of one prefill, summed over the layers.

    Where several processes share the model, collectives are a stage of their own, which includes
    waiting for the other processes; its share is the mean over the processes.
    """
    collectives = timed_collectives() if is_shared() else nullcontext()
    with place(), collectives, StageTimer(model.device) as timer:
        started = time.perf_counter()
        first_token(model, ids)
        elapsed = 1e3 * (time.perf_counter() - started)
    stages = timer.milliseconds()
    if not is_shared():
        return {"stages_ms": stages, "num_stage_samples": 1}
    shares = gather_over_ranks(stages.get(COMMUNICATION, 0.0) / elapsed)
    (share,) = mean_over_ranks([stages.get(COMMUNICATION, 0.0) / elapsed])
    return {
        "stages_ms": stages,
        "num_stage_samples": 1,
        "communication_share": share,
        "communication_share_by_rank": shares,
    }

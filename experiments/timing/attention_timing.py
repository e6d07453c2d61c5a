"""Times one attention call of methods beside every dense kernel: the op level.

A cell is a head shape, a length and, if it is set, a density. Importable without hydra and wandb.
Legend: see :mod:`pbs.ops.grid`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor

from experiments.gate.coverage import measure_coverage, sample_rows
from experiments.gate.rows import RowCheck, check_rows
from experiments.machine_load import LoadMeter
from experiments.memory import (
    PeakMemory,
    device_bytes,
    is_out_of_memory,
    peak_memory,
    poisoned_memory,
    release_memory,
)
from experiments.timing.attention_ratios import add_ratios
from experiments.timing.cost_model import Rates, attention_memory
from experiments.timing.counted_methods import counted_settings, least_density
from experiments.timing.dense_kernels import DenseKernel
from experiments.timing.densities import ControlledDensity
from experiments.timing.inputs import Cell, Inputs, Record, draw_sets
from experiments.timing.length_plan import lack_of_memory
from experiments.timing.stopwatch import (
    LONG_ROUND,
    VARIANT_ERRORS,
    Effort,
    Failure,
    Stopwatch,
    Timing,
    hold_device,
    run_in_stages,
    time_interleaved,
)
from pbs.methods.base import AttentionMethod
from pbs.ops.plan import AttentionPlan

logger = logging.getLogger(__name__)

STAGES = ("order", "selection", "gather", "attention")


def measure_cell(
    cell: Cell,
    methods: Mapping[str, AttentionMethod],
    dense: Mapping[str, DenseKernel],
    *,
    effort: Effort | None,
    rates: Rates | None = None,
    inputs: Sequence[Inputs] | None = None,
    coverage_rows: int = 64,
    check_heads: int = 4,
    num_input_sets: int = 2,
    stage_rounds: int = 5,
    memory: float | None = None,
) -> Record:
    """Check, then time, one cell; what fails is in the record as such.

    Args:
        cell: what.
        methods: by label; with ``cell.density`` each is wrapped in :class:`ControlledDensity`.
        dense: from :func:`experiments.timing.dense_kernels.dense_kernels`.
        effort: how long to time, all variants together; None checks and takes no times.
        rates: of the device, for floors.
        inputs: sets of q, k, v to use instead of drawn ones; calls take turns over the sets.
        coverage_rows: queries to measure coverage on; 0 leaves it out.
        check_heads: query heads whose rows are checked.
        num_input_sets: sets to draw; fewer where they would not fit.
        stage_rounds: calls of each method that are taken apart into stages; 0 leaves them out.
        memory: bytes the device has; what needs more is not tried. Default: as the system says.

    Returns:
        ``Cell.describe``, "load" (see :mod:`experiments.machine_load`) and "dense" and "methods":
        by name, times of the device and of a caller who waits, with all samples, error, peak
        memory, TFLOP/s; methods also with stages, density, coverage, speed-ups and floors. A cell
        for which memory does not even hold the inputs has a "failure".
    """
    record: Record = cell.describe()
    if cell.density is not None:
        methods = {
            label: ControlledDensity(method=method, target_density=cell.density, seed=cell.seed)
            for label, method in methods.items()
        }
    memory = device_bytes(cell.device) if memory is None else memory
    lack = lack_of_memory(attention_memory("flash", cell.shape, cell.length), memory)
    if lack is not None:
        failure = Failure("does not fit", lack)
        return {**record, "failure": failure.to_dict(), "dense": {}, "methods": {}}
    try:
        sets = list(inputs) if inputs is not None else draw_sets(cell, num_input_sets)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {**record, "failure": Failure.of(error).to_dict(), "dense": {}, "methods": {}}
    runs: dict[str, _Variant] = {}
    for name, kernel in dense.items():
        runs[f"dense {name}"] = _Variant(_calls_kernel(kernel, cell), None)
    for label, method in methods.items():
        runs[f"method {label}"] = _Variant(_calls_method(method, cell), method)
    heads = _spread(cell.shape.q_heads, check_heads)
    facts: dict[str, Record | Failure] = {}
    for name, run in runs.items():
        lack = _lack(run.method, cell, memory)
        facts[name] = (
            Failure("does not fit", lack)
            if lack is not None
            else _examine(run, cell, sets[0], heads, coverage_rows)
        )
    timed = {
        name: _takes_turns(run.call, sets)
        for name, run in runs.items()
        if not isinstance(facts[name], Failure)
    }
    times: Mapping[str, Timing | Failure] = {}
    if effort is not None:
        meter = LoadMeter()
        earlier = {name: facts[name]["first_ms"] for name in timed}
        times = time_interleaved(
            timed, device=cell.device, effort=effort, earlier_ms=earlier, holds=True
        )
        record["load"] = meter.lap()
    for kind in ("dense", "methods"):
        record[kind] = {}
    for name in runs:
        kind, _, label = name.partition(" ")
        entry = _entry(facts[name], times.get(name))
        record["dense" if kind == "dense" else "methods"][label] = entry
    if effort is not None:
        for label, method in methods.items():
            entry = record["methods"][label]
            if stage_rounds and entry["median_ms"] is not None and not entry["dense_reason"]:
                entry |= _stages(method, sets, cell, stage_rounds)
        add_ratios(record, cell, methods, rates)
    del sets
    release_memory()
    return record


def _entry(found: Record | Failure, time: Timing | Failure | None) -> Record:
    """A variant's times and what its examination found; only the failure if there is one."""
    if isinstance(found, Failure):
        return found.to_dict()
    return {**({} if time is None else time.to_dict()), **found}


@dataclass(frozen=True)
class _Variant:
    """A call on one set of inputs, and the method it belongs to, if any."""

    call: Callable[[Tensor, Tensor, Tensor], Tensor]
    method: AttentionMethod | None


def _calls_kernel(kernel: DenseKernel, cell: Cell) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: kernel(q, k, v, scale=cell.scale)


def _calls_method(
    method: AttentionMethod, cell: Cell
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: method(q, k, v, scale=cell.scale, layer_idx=0)


def _takes_turns(
    call: Callable[[Tensor, Tensor, Tensor], Tensor], sets: Sequence[Inputs]
) -> Callable[[int], object]:
    return lambda index: call(*sets[index % len(sets)])


def _examine(
    run: _Variant, cell: Cell, inputs: Inputs, heads: Sequence[int], coverage_rows: int
) -> Record | Failure:
    """The gate, density, coverage and peak memory of one variant; a Failure stops its timing."""
    plans: list[AttentionPlan] = []
    failure = None
    try:
        if run.method is not None:
            run.method.recorder = lambda call: plans.append(call.plan)
        out, first_ms, peak, has_compiled = _call_once(run, cell, inputs, poisons=True)
        plan = plans[0] if plans else None
        settings = {"scale": cell.scale, "heads": heads, "seed": cell.seed}
        if run.method is not None:
            settings["precision"] = run.method.precision
        check = check_rows(out, *inputs, plan, **settings)
        del out
        if not check.passed:
            return Failure("incorrect", str(check))
        found = _describe_check(check)
        if plan is not None:
            found |= _describe_plan(plan, inputs, cell, heads, coverage_rows)
        del plan
        plans.clear()
        if run.method is not None:
            run.method.recorder = None
        if first_ms < 1e3 * LONG_ROUND or has_compiled:
            # The first call may have compiled, and tuned on copies of its arguments; the memory of
            # such a call is not that of the method.
            _, first_ms, peak, _ = _call_once(run, cell, inputs)
        found |= {"peak_bytes": peak, "first_ms": first_ms}
    except VARIANT_ERRORS as error:
        failure = Failure.of_variant(error, is_dense=run.method is None)
        if failure.kind == "error":
            logger.warning("a variant failed and gets no time: %s", error, exc_info=True)
    finally:
        if run.method is not None:
            run.method.recorder = None
    if failure is not None:
        plans.clear()
        release_memory(collects=True)  # after the handler: the traceback holds tensors
        return failure
    return found


def _lack(method: AttentionMethod | None, cell: Cell, memory: float | None) -> str | None:
    """Why a variant cannot fit, if that is known before it is tried."""
    settings = None if method is None else counted_settings(method)
    if method is None or settings is None:
        return None
    needed = attention_memory(
        settings["method"],
        cell.shape,
        cell.length,
        density=least_density(method),
        block_size=settings["block_size"],
        shared_order=settings["shared_order"],
    )
    return lack_of_memory(needed, memory)


def _call_once(
    run: _Variant, cell: Cell, inputs: Inputs, *, poisons: bool = False
) -> tuple[Tensor, float, int | None, bool]:
    """Output, milliseconds, extra memory (the output included), and whether a kernel was compiled.

    A GPU that waits for the host most of a long call waits for a compiler: launching takes
    milliseconds.
    """
    outputs: list[Tensor] = []
    stopwatch = Stopwatch(cell.device, holds=True)
    peak: PeakMemory
    poison = poisoned_memory(cell.device, inputs[0].nbytes) if poisons else nullcontext()
    with peak_memory(cell.device) as peak, poison:
        elapsed = stopwatch(lambda: outputs.append(run.call(*inputs)))
    has_compiled = cell.device.type == "cuda" and stopwatch.host_ms > elapsed / 2
    return outputs[0], elapsed, peak.num_bytes, has_compiled


def _describe_check(check: RowCheck) -> Record:
    return {
        "error": check.error,
        "allowed_error": check.allowed,
        "relative_error": check.relative,
        "rows_checked": check.num_rows,
    }


def _describe_plan(
    plan: AttentionPlan, inputs: Inputs, cell: Cell, heads: Sequence[int], coverage_rows: int
) -> Record:
    q, k, _ = inputs
    found: Record = {
        "density": float(plan.density().mean()),
        "dense_reason": plan.reason if plan.is_dense else "",
        "coverage": None,
    }
    if coverage_rows:
        rows = sample_rows(q.shape[2], min(coverage_rows, q.shape[2]), seed=cell.seed)
        coverage = measure_coverage(
            q, k, plan, scale=cell.scale, heads=heads, rows=rows, chunk_rows=16
        )
        found["coverage"] = float(coverage.mean())
        found |= {"coverage_heads": list(heads), "coverage_rows": len(rows)}
    return found


def _stages(method: AttentionMethod, sets: Sequence[Inputs], cell: Cell, num_rounds: int) -> Record:
    """Median milliseconds of each stage, over calls apart from the timed ones."""
    samples: dict[str, list[float]] = {}
    stopwatch = Stopwatch(cell.device)
    for index in range(num_rounds):
        q, k, v = sets[index % len(sets)]
        stopwatch(lambda: None)  # empties the cache, as before timed calls
        hold_device(cell.device)
        for name, value in run_in_stages(method, q, k, v, scale=cell.scale).items():
            samples.setdefault(name, []).append(value)
    medians = {name: Timing(tuple(values)).median_ms for name, values in samples.items()}
    return {
        "stages_ms": {name: medians.get(name, 0.0) for name in STAGES}
        | {name: value for name, value in medians.items() if name not in STAGES},
        "num_stage_samples": num_rounds,
        "stage_samples_ms": samples,
    }


def _spread(count: int, chosen: int) -> list[int]:
    """Numbers below ``count``, evenly spread, first and last among them."""
    if chosen >= count:
        return list(range(count))
    if chosen == 1:
        return [count - 1]
    return sorted({round(index * (count - 1) / (chosen - 1)) for index in range(chosen)})

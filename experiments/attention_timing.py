"""Times one attention call of methods beside every dense kernel: the op level.

A cell is a head shape, a length and, if it is set, a density. Importable without hydra and wandb.
Legend: see :mod:`pbs.ops.grid`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.controlled_density import ControlledDensity
from experiments.cost_model import Rates, Shape, Work, dense_flops, floor_ms, method_cost
from experiments.coverage import measure_coverage, sample_rows
from experiments.dense_kernels import DenseKernel
from experiments.exact_rows import RowCheck, check_rows
from experiments.timing import (
    LONG_ROUND,
    VARIANT_ERRORS,
    Effort,
    Failure,
    PeakMemory,
    Stopwatch,
    Timing,
    is_out_of_memory,
    peak_memory,
    poisoned_memory,
    release_memory,
    run_in_stages,
    time_interleaved,
)
from pbs.methods.base import AttentionMethod
from pbs.ops.plan import AttentionPlan
from pbs.testing import make_qkv

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Inputs = tuple[Tensor, Tensor, Tensor]

STAGES = ("order", "selection", "gather", "attention")
# Elements of q up to which all heads are drawn; above it one group is, the others are its turns.
MAX_DRAWN = 1 << 23
# Class of a method to its name in the cost model.
COUNTED = {
    "PBS": "pbs",
    "PBSPlus": "pbs_plus",
    "MeanPooling": "meanpool",
    "XAttention": "xattention",
    "FlexPrefill": "flexprefill",
    "Prism": "prism",
    "MInference": "minference",
    "StreamingLLM": "streaming",
}


@dataclass(frozen=True)
class Cell:
    """What is measured.

    Args:
        shape: heads.
        length: N, queries and keys.
        dtype: of q, k, v.
        device: where.
        structure: of the inputs: "random", "vertical", "slash" or "mixed".
        density: share of the tiles that every method computes; None: what it selects itself.
        seed: of inputs and tiles.
    """

    shape: Shape
    length: int
    dtype: torch.dtype
    device: torch.device
    structure: str = "mixed"
    density: float | None = None
    seed: int = 0

    @property
    def scale(self) -> float:
        """Factor of the logits."""
        return float(self.shape.head_dim**-0.5)

    def describe(self) -> Record:
        """The columns that name the cell."""
        return {
            "length": self.length,
            "q_heads": self.shape.q_heads,
            "kv_heads": self.shape.kv_heads,
            "head_dim": self.shape.head_dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "structure": self.structure,
            "target_density": self.density,
        }


def draw_inputs(cell: Cell, *, num_sets: int = 1) -> list[Inputs]:
    """Sets of q, k and v of a cell.

    Noise is drawn on the device. Up to ``MAX_DRAWN`` elements of q, other structures are
    :func:`pbs.testing.make_qkv`'s. Above, that draws the heads of one key/value group, and groups
    and sets are turned copies of it (dimensions permuted and signs flipped, alike in q and k: same
    attention, other numbers) with values of their own.
    """
    shape = cell.shape
    seeds = [cell.seed + 1000 * index for index in range(num_sets)]
    if cell.structure == "random":
        return [_noise(cell, seed) for seed in seeds]
    options: dict[str, Any] = {
        "structure": cell.structure,
        "dtype": cell.dtype,
        "device": cell.device,
    }
    sizes = cell.length, shape.head_dim
    if shape.q_heads * shape.head_dim * cell.length <= MAX_DRAWN:
        drawn = [
            make_qkv(1, shape.q_heads, shape.kv_heads, *sizes, seed=seed, **options)
            for seed in seeds
        ]
        return [(one.q, one.k, one.v) for one in drawn]
    one = make_qkv(1, shape.q_heads // shape.kv_heads, 1, *sizes, seed=cell.seed, **options)
    return [_turned(one.q, one.k, cell, seed) for seed in seeds]


def _turned(q: Tensor, k: Tensor, cell: Cell, seed: int) -> Inputs:
    """All heads from those of one group."""
    inputs = _empty(cell)
    groups = q.shape[1]
    generator = torch.Generator().manual_seed(seed)
    for head in range(cell.shape.kv_heads):
        dims = torch.randperm(cell.shape.head_dim, generator=generator).to(cell.device)
        signs = torch.randint(0, 2, (cell.shape.head_dim,), generator=generator) * 2 - 1
        signs = signs.to(device=cell.device, dtype=cell.dtype)
        inputs[0][:, head * groups : (head + 1) * groups] = q[..., dims] * signs
        inputs[1][:, head : head + 1] = k[..., dims] * signs
    inputs[2].normal_(generator=torch.Generator(cell.device).manual_seed(seed))
    return inputs


def measure_cell(
    cell: Cell,
    methods: Mapping[str, AttentionMethod],
    dense: Mapping[str, DenseKernel],
    *,
    effort: Effort,
    rates: Rates | None = None,
    inputs: Sequence[Inputs] | None = None,
    coverage_rows: int = 64,
    check_heads: int = 4,
    num_input_sets: int = 2,
    stage_rounds: int = 5,
) -> Record:
    """Check, then time, one cell; what fails is in the record as such.

    Args:
        cell: what.
        methods: by label; with ``cell.density`` each is wrapped in :class:`ControlledDensity`.
        dense: from :func:`experiments.dense_kernels.dense_kernels`.
        effort: how long to time, all variants together.
        rates: of the device, for floors.
        inputs: sets of q, k, v to use instead of drawn ones; calls take turns over the sets.
        coverage_rows: queries to measure coverage on; 0 leaves it out.
        check_heads: query heads whose rows are checked.
        num_input_sets: sets to draw; fewer where they would not fit.
        stage_rounds: calls of each method that are taken apart into stages; 0 leaves them out.

    Returns:
        ``Cell.describe`` and "dense" and "methods": by name, times with all samples, error,
        peak memory, TFLOP/s; methods also with stages, density, coverage, speed-ups and floors.
        A cell for which memory does not even hold the inputs has a "failure".
    """
    record: Record = cell.describe()
    if cell.density is not None:
        methods = {
            label: ControlledDensity(method=method, target_density=cell.density, seed=cell.seed)
            for label, method in methods.items()
        }
    try:
        sets = list(inputs) if inputs is not None else _draw_sets(cell, num_input_sets)
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
    facts = {name: _examine(run, cell, sets[0], heads, coverage_rows) for name, run in runs.items()}
    timed = {
        name: _takes_turns(run.call, sets)
        for name, run in runs.items()
        if not isinstance(facts[name], Failure)
    }
    expected = sum(f["first_ms"] for f in facts.values() if not isinstance(f, Failure)) / 1e3
    times = time_interleaved(timed, device=cell.device, effort=effort, seconds_per_round=expected)
    for kind in ("dense", "methods"):
        record[kind] = {}
    for name in runs:
        kind, _, label = name.partition(" ")
        found = facts[name]
        time = found if isinstance(found, Failure) else times[name]
        entry = {**time.to_dict(), **({} if isinstance(found, Failure) else found)}
        record["dense" if kind == "dense" else "methods"][label] = entry
    for label, method in methods.items():
        entry = record["methods"][label]
        if stage_rounds and entry["median_ms"] is not None and not entry["dense_reason"]:
            entry |= _stages(method, sets, cell, stage_rounds)
    _derive(record, cell, methods, rates)
    del sets
    release_memory()
    return record


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
        out, first_ms, peak = _call_once(run, cell, inputs, poisons=True)
        plan = plans[0] if plans else None
        check = check_rows(out, *inputs, plan, scale=cell.scale, heads=heads, seed=cell.seed)
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
        if first_ms < 1e3 * LONG_ROUND:
            # The first call also compiled, and may have tuned on copies of its arguments.
            _, first_ms, peak = _call_once(run, cell, inputs)
        found |= {"peak_bytes": peak, "first_ms": first_ms}
    except VARIANT_ERRORS as error:
        failure = Failure.of(error, _kind_of(error, run))
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


def _kind_of(error: Exception, run: _Variant) -> str:
    """What a failure is to be called; a dense kernel says by any of them that it does not fit."""
    if is_out_of_memory(error):
        return "out of memory"
    is_refusal = run.method is None or isinstance(error, NotImplementedError)
    return "unavailable" if is_refusal else "error"


def _call_once(
    run: _Variant, cell: Cell, inputs: Inputs, *, poisons: bool = False
) -> tuple[Tensor, float, int | None]:
    """Output, milliseconds and extra memory (the output included) of one call."""
    outputs: list[Tensor] = []
    stopwatch = Stopwatch(cell.device)
    peak: PeakMemory
    poison = poisoned_memory(cell.device, inputs[0].nbytes) if poisons else nullcontext()
    with peak_memory(cell.device) as peak, poison:
        elapsed = stopwatch(lambda: outputs.append(run.call(*inputs)))
    return outputs[0], elapsed, peak.num_bytes


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
    return found


def _stages(method: AttentionMethod, sets: Sequence[Inputs], cell: Cell, num_rounds: int) -> Record:
    """Median milliseconds of each stage, over calls apart from the timed ones."""
    samples: dict[str, list[float]] = {}
    stopwatch = Stopwatch(cell.device)
    for index in range(num_rounds):
        q, k, v = sets[index % len(sets)]
        stopwatch(lambda: None)  # empties the cache, as before timed calls
        for name, value in run_in_stages(method, q, k, v, scale=cell.scale).items():
            samples.setdefault(name, []).append(value)
    medians = {name: Timing(tuple(values)).median_ms for name, values in samples.items()}
    return {
        "stages_ms": {name: medians.get(name, 0.0) for name in STAGES}
        | {name: value for name, value in medians.items() if name not in STAGES},
        "stage_samples_ms": samples,
    }


def _derive(
    record: Record, cell: Cell, methods: Mapping[str, AttentionMethod], rates: Rates | None
) -> None:
    """What follows from times and counts: TFLOP/s, speed-ups, shares, floors."""
    flops = dense_flops(cell.shape, cell.length)
    known = {name: e for name, e in record["dense"].items() if e["median_ms"] is not None}
    for name, entry in known.items():
        entry["tflops"] = flops / entry["median_ms"] / 1e9
        if rates is not None:
            work = method_cost("flash", cell.shape, cell.length)
            entry["floor_ms"] = floor_ms(work, rates)
        entry["is_fastest"] = name == min(known, key=lambda n: known[n]["median_ms"])
    fastest = next((name for name, entry in known.items() if entry["is_fastest"]), None)
    record["fastest_dense"] = fastest
    record["input_bytes"] = cell.shape.input_bytes(cell.length)
    for label, entry in record["methods"].items():
        if entry["median_ms"] is None:
            continue
        entry["speed_up"] = {
            name: dense["median_ms"] / entry["median_ms"] for name, dense in known.items()
        }
        entry["speed_up_over_fastest"] = entry["speed_up"].get(fastest) if fastest else None
        if entry.get("peak_bytes") is not None:
            entry["peak_over_inputs"] = entry["peak_bytes"] / record["input_bytes"]
        if "stages_ms" in entry and entry["stages_ms"]["attention"] > 0:
            tflops = entry["density"] * flops / entry["stages_ms"]["attention"] / 1e9
            entry["attention_tflops"] = tflops
            if fastest:
                entry["share_of_dense_tflops"] = tflops / known[fastest]["tflops"]
            overhead = sum(entry["stages_ms"].values()) - entry["stages_ms"]["attention"]
            entry["overhead_share"] = overhead / sum(entry["stages_ms"].values())
        work = _cost_of(methods[label], cell, entry)
        if rates is not None and work is not None:
            entry["floor_ms"] = floor_ms(work, rates)
            entry["stage_floors_ms"] = {name: w.floor_ms(rates) for name, w in work.items()}


def _cost_of(method: AttentionMethod, cell: Cell, entry: Record) -> Mapping[str, Work] | None:
    """The cost model's stages of a method, from its own parameters; None without a count."""
    inner = method.method if isinstance(method, ControlledDensity) else method
    name = "flash" if entry["dense_reason"] else COUNTED.get(type(inner).__name__)
    if name is None:
        return None
    return method_cost(
        name,
        cell.shape,
        cell.length,
        density=1.0 if entry["dense_reason"] else entry["density"],
        block_size=getattr(inner, "block_size", 128),
        shared_order=getattr(inner, "gqa", "") == "shared",
        stride=getattr(inner, "stride", 8),
    )


def _draw_sets(cell: Cell, count: int) -> list[Inputs]:
    """Sets of inputs, as many as a quarter of the free memory holds, at least one."""
    if cell.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(cell.device)
        count = min(count, int(0.25 * free / cell.shape.input_bytes(cell.length)))
    return draw_inputs(cell, num_sets=max(1, count))


def _noise(cell: Cell, seed: int) -> Inputs:
    """Unit noise drawn on the device."""
    generator = torch.Generator(cell.device).manual_seed(seed)
    q, k, v = _empty(cell)
    return tuple(x.normal_(generator=generator) for x in (q, k, v))  # type: ignore[return-value]


def _empty(cell: Cell) -> Inputs:
    shape = cell.shape
    sizes = (shape.q_heads, shape.kv_heads, shape.kv_heads)
    return tuple(  # type: ignore[return-value]
        torch.empty(1, h, cell.length, shape.head_dim, dtype=cell.dtype, device=cell.device)
        for h in sizes
    )


def _spread(count: int, chosen: int) -> list[int]:
    """Numbers below ``count``, evenly spread, first and last among them."""
    if chosen >= count:
        return list(range(count))
    if chosen == 1:
        return [count - 1]
    return sorted({round(index * (count - 1) / (chosen - 1)) for index in range(chosen)})

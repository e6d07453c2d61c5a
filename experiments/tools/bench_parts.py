"""The parts of ``make bench-gpu``: gate, Table 7, selection cost, time to first token.

Needs no hydra and no wandb. Each part measures what there is time for and records the rest as
skipped. The gate checks and takes no times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from experiments.timing.attention_timing import measure_cell
from experiments.timing.cost_model import Shape, dense_flops
from experiments.timing.inputs import Cell, Record
from experiments.timing.published import density_at
from experiments.timing.stopwatch import Effort
from experiments.tools.bench_run import BenchRun

# Samples of every variant at least: many up to a length, for whole models a shorter one, few above.
MANY_ROUNDS, FEW_ROUNDS, MOST_ROUNDS = 10, 5, 20
MANY_UP_TO = {"table7": 65536, "selection": 65536, "ttft": 32768}
# A round of all variants in dense calls at ``PREDICTED_FLOPS``, as measured on an H100. At the
# level of an op a round calls each of them twice, for the device's time and the wait, unless calls
# are long (``timing.LONG_CALL_MS``).
CALLS_PER_ROUND = {"table7": 2.7, "selection": 6.4, "ttft": 2.7}
CALLED_TWICE_UP_TO = {"table7": 262144, "selection": 262144, "ttft": 0}
# Rounds' worth of calls before the first that counts: the gate, compilers, warm-up.
ROUNDS_BEFORE = 2.5


def fewest_rounds(part: str, length: int) -> int:
    """Samples of every variant that a cell of this part has at least."""
    return MANY_ROUNDS if length <= MANY_UP_TO[part] else FEW_ROUNDS


def num_calls(part: str, length: int) -> float:
    """Dense calls' worth of work of a cell, for predicting its time."""
    times = 2 if length <= CALLED_TWICE_UP_TO[part] else 1
    return CALLS_PER_ROUND[part] * (times * fewest_rounds(part, length) + ROUNDS_BEFORE)


def _effort(part: str, length: int, seconds: float) -> Effort:
    return Effort(seconds, fewest_rounds(part, length), MOST_ROUNDS)


def gate_part(run: BenchRun) -> list[Record]:
    """Every method and head dim, at lengths that divide nothing too, against exact attention."""
    dtypes = (torch.bfloat16, torch.float16) if run.device.type == "cuda" else (torch.float32,)
    records = []
    for cell, labels in _gate_cells(run, dtypes):
        if run.seconds_left() < 0:
            run.skip("gate", cell.describe())
            continue
        records.append(
            run.attempt(
                "gate",
                cell.describe(),
                lambda cell=cell, labels=labels: measure_cell(
                    cell,
                    run.plan.build(*labels),
                    run.dense,
                    effort=None,
                    coverage_rows=0,
                    check_heads=8,
                    num_input_sets=1,
                    stage_rounds=0,
                ),
            )
        )
    return records


def _gate_cells(
    run: BenchRun, dtypes: Sequence[torch.dtype]
) -> Iterator[tuple[Cell, tuple[str, ...]]]:
    """The main head dim with all methods first, the others with PBS at a length with a rest."""
    for shape in run.plan.gate_shapes:
        is_main = shape == run.plan.gate_shapes[0]
        labels = () if is_main else ("pbs", "pbs shared")
        for length in run.plan.gate_lengths if is_main else run.plan.gate_lengths[:1]:
            for dtype in dtypes:
                heads = Shape.parse(shape, element_size=dtype.itemsize)
                yield Cell(heads, length, dtype, run.device, "mixed"), labels


def gate_lines(run: BenchRun) -> list[str]:
    """One line per cell: the worst error against what is allowed, and what failed."""
    lines = []
    for record in run.results["parts"].get("gate", []):
        entries = {**record["dense"], **record["methods"]}
        if "failure" in record:
            entries = {"cell": record["failure"]}
        bad = {name: e for name, e in entries.items() if "failure" in e}
        ratios = [e["error"] / e["allowed_error"] for e in entries.values() if "error" in e]
        worst = f"worst error / allowed {max(ratios):.2f}" if ratios else "nothing compared"
        lines.append(
            f"{record['q_heads']}/{record['kv_heads']}/{record['head_dim']} {record['dtype']} "
            f"N={record['length']}: {len(ratios)} of {len(entries)} variants pass, {worst}"
        )
        lines += [f"    {name}: {e['failure']}: {e['message'][:160]}" for name, e in bad.items()]
    return lines


def run_table7(run: BenchRun) -> list[Record]:
    """The paper's Table 7: its lengths and densities, per-head and shared order, all dense."""
    records = []
    for length in run.plan.table7_lengths:
        density, is_published = density_at(length)
        cell = run.cell(length, density=density)
        name = {**cell.describe(), "is_published_density": is_published}
        calls = num_calls("table7", length)
        if not run.has_time_for(dense_flops(cell.shape, length), calls=calls, extra=length / 3e4):
            run.skip("table7", name)
            continue
        effort = _effort("table7", length, min(4.0, max(1.0, run.seconds_left() / 10)))
        records.append(
            run.attempt(
                "table7",
                name,
                lambda cell=cell, effort=effort: measure_cell(
                    cell,
                    run.plan.build("pbs", "pbs shared"),
                    run.dense,
                    effort=effort,
                    rates=run.rates,
                    coverage_rows=0,
                ),
            )
        )
    return records


def run_selection(run: BenchRun) -> list[Record]:
    """Every method at what it selects itself, on structured inputs: stages, and break-even."""
    records = []
    for length in run.plan.selection_lengths:
        cell = run.cell(length)
        calls = num_calls("selection", length)
        if not run.has_time_for(dense_flops(cell.shape, length), calls=calls, extra=length / 3e4):
            run.skip("selection", cell.describe())
            continue
        effort = _effort("selection", length, min(5.0, max(1.0, run.seconds_left() / 10)))
        records.append(
            run.attempt(
                "selection",
                cell.describe(),
                lambda cell=cell, effort=effort: measure_cell(
                    cell,
                    run.plan.build(),
                    run.dense,
                    effort=effort,
                    rates=run.rates,
                    coverage_rows=16,
                ),
            )
        )
    return records


def run_ttft(run: BenchRun) -> list[Record]:
    """Time to first token at the paper's densities, Llama-3.1-8B's architecture, random weights."""
    from experiments.models.random_weights import ARCHITECTURES, build_random_model, random_ids
    from experiments.timing.prefill_timing import measure_prefill

    model = build_random_model(
        ARCHITECTURES / "llama31_8b",
        dtype=run.dtype,
        device=run.device,
        changes=run.plan.model_changes,
    )
    config = model.config
    shape = Shape(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    kernels = [name for name in run.dense if name in ("flash", "cudnn", "fa3", "fa4", "cpu")]
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    records = []
    for length in run.plan.ttft_lengths:
        density, is_published = density_at(length)
        name = {
            "length": length,
            "target_density": density,
            "model": "Llama-3.1-8B architecture, random weights",
            "is_published_density": is_published,
        }
        work = config.num_hidden_layers * dense_flops(shape, length) + 2 * num_parameters * length
        if not run.has_time_for(work, calls=num_calls("ttft", length)):
            run.skip("ttft", name)
            continue
        prompts = [
            random_ids(config.vocab_size, length, device=run.device, seed=seed) for seed in (0, 1)
        ]
        effort = _effort("ttft", length, min(30.0, max(0.5, run.seconds_left() / 8)))
        records.append(
            run.attempt(
                "ttft",
                name,
                lambda prompts=prompts, density=density, effort=effort: measure_prefill(
                    model,
                    prompts,
                    run.plan.build("pbs", "pbs shared"),
                    kernels,
                    effort=effort,
                    density=density,
                    rates=run.rates,
                ),
            )
        )
    return records


RUNNERS = {
    "gate": gate_part,
    "table7": run_table7,
    "selection": run_selection,
    "ttft": run_ttft,
}

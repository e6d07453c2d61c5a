"""``make bench-gpu``: every number that needs a GPU, by one command, in minutes.

Runs the correctness gate, Table 7 of the paper, the selection cost of every method with break-even
lengths, and the time to first token of Llama-3.1-8B with random weights. Needs no hydra, no wandb
and no network. Results are written after every cell, so that a time limit keeps what is done:
``results.json`` (everything, with all samples) and a CSV per part.

    python -m experiments.bench_gpu --out DIR [--parts gate,table7,selection,ttft] [--seconds 520]
    python -m experiments.bench_gpu --out DIR --device cpu --smoke     # tiny: does it run?
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from experiments.attention_timing import Cell, measure_cell
from experiments.cost_model import Shape, dense_flops
from experiments.dense_kernels import dense_kernels
from experiments.environment import describe_environment
from experiments.published import TABLE7, density_at
from experiments.store import to_json, write_atomically
from experiments.timing import Effort, is_out_of_memory, measure_rates, release_memory
from experiments.timing_report import break_evens, lines_of, table_rows
from pbs.methods import AttentionMethod, build_method

Record = dict[str, Any]

PARTS = ("gate", "table7", "selection", "ttft")
# Shares of the time budget; what a part leaves goes to those after it.
SHARES = {"gate": 0.20, "table7": 0.28, "selection": 0.24, "ttft": 0.28}
# Longest cells with structured inputs: above, drawing them on the host would take most of the time.
MAX_STRUCTURED = 131072
# Assumed when predicting whether a cell still fits: dense FLOP/s of the slowest kernel.
PREDICTED_FLOPS = {"cuda": 350e12, "cpu": 2e10}


@dataclass(frozen=True)
class Plan:
    """Sizes of a run."""

    shape: str = "32/8/128"
    table7_lengths: tuple[int, ...] = (8192, 16384, 32768, 65536, 131072, 262144, 524288)
    selection_lengths: tuple[int, ...] = (8192, 16384, 32768, 65536, 131072)
    ttft_lengths: tuple[int, ...] = (8192, 16384, 32768, 65536, 131072, 262144)
    gate_lengths: tuple[int, ...] = (1000, 4096)
    gate_shapes: tuple[str, ...] = ("8/2/128", "8/2/64", "8/2/96", "4/4/256")
    model_changes: dict[str, int] = field(default_factory=dict)
    methods: dict[str, tuple[str, dict[str, Any]]] = field(
        default_factory=lambda: {
            "pbs": ("pbs", {}),
            "pbs shared": ("pbs", {"gqa": "shared"}),
            "pbs_plus": ("pbs_plus", {}),
            "meanpool": ("meanpool", {}),
            "xattention": ("xattention", {}),
            "flexprefill": ("flexprefill", {}),
            "prism": ("prism", {}),
            "minference": ("minference", {"preset": "llama31-v2"}),
            "streaming": ("streaming", {}),
        }
    )

    @classmethod
    def smoke(cls) -> Plan:
        """Seconds on a CPU."""
        small = {"vertical_size": 64, "slash_size": 256}
        return cls(
            shape="4/2/32",
            table7_lengths=(512, 1024),
            selection_lengths=(512, 1024),
            ttft_lengths=(512, 1024),
            gate_lengths=(300, 600),
            gate_shapes=("4/2/32",),
            model_changes={
                "num_hidden_layers": 2,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 32,
                "vocab_size": 256,
            },
            methods={
                "pbs": ("pbs", {}),
                "pbs shared": ("pbs", {"gqa": "shared"}),
                "minference": ("minference", small),
                "streaming": ("streaming", {"n_init": 32, "n_local": 128}),
            },
        )

    def build(self, *labels: str) -> dict[str, AttentionMethod]:
        """Methods by label; default all."""
        return {
            label: build_method(name, **params)
            for label, (name, params) in self.methods.items()
            if not labels or label in labels
        }


class Run:
    """One invocation: what it measures on, what it has found, what time is left."""

    def __init__(self, out: Path, device: torch.device, plan: Plan, *, commit: str | None) -> None:
        self.out, self.device, self.plan = out, device, plan
        is_cuda = device.type == "cuda"
        self.dtype = torch.bfloat16 if is_cuda else torch.float32
        self.rates = measure_rates(device, self.dtype)
        self.dense = dense_kernels(device)
        environment = describe_environment()
        environment["commit"] = commit or environment["commit"]
        if commit is not None:  # the files came without the repository
            environment["is_dirty"] = None
        if is_cuda:
            properties = torch.cuda.get_device_properties(device)
            environment["memory_bytes"] = properties.total_memory
        self.results: Record = {
            "environment": environment,
            "rates": self.rates.__dict__,
            "command": " ".join(["python -m experiments.bench_gpu", *sys.argv[1:]]),
            "parts": {},
        }
        self.deadline = float("inf")
        self.started = time.monotonic()

    def add(self, part: str, record: Record) -> None:
        """Keep a record and write everything to disk."""
        self.results["parts"].setdefault(part, []).append(record)
        self.write(part)

    def write(self, part: str) -> None:
        """``results.json``, and the part's CSV."""
        self.results["seconds"] = time.monotonic() - self.started
        write_atomically(self.out / "results.json", to_json(self.results, indent=1) + "\n")
        records = self.results["parts"].get(part, [])
        rows = [row for record in records for row in table_rows(record)]
        if rows:
            write_atomically(self.out / f"{part}.csv", pd.DataFrame(rows).to_csv(index=False))

    def wrong(self) -> list[str]:
        """Variants that were wrong or raised; no memory and no such kernel are no errors."""
        found = []
        for part, records in self.results["parts"].items():
            for record in records:
                cell = {"cell": record.get("failure", {})}
                found += [
                    f"{part} N={record['length']} {name}: {entry['failure']}: "
                    f"{entry['message'][:200]}"
                    for name, entry in {**record["dense"], **record["methods"], **cell}.items()
                    if entry.get("failure") in ("incorrect", "error")
                ]
        return found

    def seconds_left(self) -> float:
        """Until this part's deadline."""
        return self.deadline - time.monotonic()

    def has_time_for(self, flops: float, *, calls: int, extra: float = 3.0) -> bool:
        """Whether that many dense calls of this work would end in time, by a pessimistic rate."""
        needed = calls * flops / PREDICTED_FLOPS[self.device.type] + extra
        return needed < self.seconds_left()

    def cell(self, length: int, *, density: float | None = None, shape: str | None = None) -> Cell:
        """A cell of this run."""
        heads = Shape.parse(shape or self.plan.shape, element_size=self.dtype.itemsize)
        structure = "mixed" if length <= MAX_STRUCTURED else "random"
        return Cell(heads, length, self.dtype, self.device, structure, density)

    def attempt(self, part: str, name: Record, measure: Callable[[], Record]) -> Record:
        """Measure one cell; whatever goes wrong is its result, and the run goes on."""
        try:
            record = {**name, **measure()}
        except Exception as error:  # noqa: BLE001 - the one boundary: a cell's failure is a result
            kind = "out of memory" if is_out_of_memory(error) else "error"
            message = f"{type(error).__name__}: {str(error).strip()[:500]}"
            if kind == "error":
                traceback.print_exc()
            failure = {"median_ms": None, "failure": kind, "message": message}
            record = {**name, "failure": failure, "dense": {}, "methods": {}}
        release_memory(collects="failure" in record)
        self.add(part, record)
        return record

    def skip(self, part: str, name: Record) -> None:
        """Record that there was no time for a cell."""
        failure = {"median_ms": None, "failure": "skipped", "message": "no time left for it"}
        self.add(part, {**name, "failure": failure, "dense": {}, "methods": {}})


def run_gate(run: Run) -> list[Record]:
    """Every method and head dim, at lengths that divide nothing too, against exact attention."""
    dtypes = (torch.bfloat16, torch.float16) if run.device.type == "cuda" else (torch.float32,)
    once = Effort(0.01, 1, 1)
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
                    effort=once,
                    coverage_rows=0,
                    check_heads=8,
                    num_input_sets=1,
                    stage_rounds=0,
                ),
            )
        )
    return records


def _gate_cells(run: Run, dtypes: Sequence[torch.dtype]) -> Iterator[tuple[Cell, tuple[str, ...]]]:
    """The main head dim with all methods first, the others with PBS at a length with a rest."""
    for shape in run.plan.gate_shapes:
        is_main = shape == run.plan.gate_shapes[0]
        labels = () if is_main else ("pbs", "pbs shared")
        for length in run.plan.gate_lengths if is_main else run.plan.gate_lengths[:1]:
            for dtype in dtypes:
                heads = Shape.parse(shape, element_size=dtype.itemsize)
                yield Cell(heads, length, dtype, run.device, "mixed"), labels


def run_table7(run: Run) -> list[Record]:
    """The paper's Table 7: its lengths and densities, per-head and shared order, all dense."""
    records = []
    for length in run.plan.table7_lengths:
        density, is_published = density_at(length)
        cell = run.cell(length, density=density)
        name = {**cell.describe(), "is_published_density": is_published}
        if not run.has_time_for(dense_flops(cell.shape, length), calls=6, extra=length / 3e4):
            run.skip("table7", name)
            continue
        effort = Effort(min(4.0, max(1.0, run.seconds_left() / 10)), 2, 20)
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


def run_selection(run: Run) -> list[Record]:
    """Every method at what it selects itself, on structured inputs: stages, and break-even."""
    records = []
    for length in run.plan.selection_lengths:
        cell = run.cell(length)
        if not run.has_time_for(dense_flops(cell.shape, length), calls=8, extra=length / 3e4):
            run.skip("selection", cell.describe())
            continue
        effort = Effort(min(5.0, max(1.0, run.seconds_left() / 10)), 2, 20)
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
                    stage_rounds=3,
                ),
            )
        )
    return records


def run_ttft(run: Run) -> list[Record]:
    """Time to first token at the paper's densities, Llama-3.1-8B's architecture, random weights."""
    from experiments.prefill_timing import measure_prefill
    from experiments.random_weights import ARCHITECTURES, build_random_model, random_ids

    model = build_random_model(
        ARCHITECTURES / "llama31_8b",
        dtype=run.dtype,
        device=run.device,
        changes=run.plan.model_changes,
    )
    config = model.config
    shape = Shape(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    kernels = [name for name in run.dense if name in ("flash", "cudnn", "fa3", "cpu")]
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
        if not run.has_time_for(work, calls=6):
            run.skip("ttft", name)
            continue
        prompts = [
            random_ids(config.vocab_size, length, device=run.device, seed=seed) for seed in (0, 1)
        ]
        effort = Effort(min(30.0, max(0.5, run.seconds_left() / 8)), 1, 10)
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
                ),
            )
        )
    return records


RUNNERS = {
    "gate": run_gate,
    "table7": run_table7,
    "selection": run_selection,
    "ttft": run_ttft,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1: an output was wrong, or a part failed as a whole; times then mean nothing."""
    options = _parse(arguments)
    device = torch.device(options.device)
    plan = Plan.smoke() if options.smoke else Plan()
    options.out.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        run = Run(options.out, device, plan, commit=options.commit)
        _say(f"{run.results['environment']['device']}; floors by: {run.rates.name}")
        end = run.started + options.seconds
        left = list(options.parts)
        while left:
            part = left.pop(0)
            share = SHARES[part] / sum(SHARES[name] for name in (part, *left))
            run.deadline = time.monotonic() + share * (end - time.monotonic())
            _say(f"\n== {part}, at most {run.seconds_left():.0f} s")
            started = time.monotonic()
            try:
                records = RUNNERS[part](run)
            except (RuntimeError, ValueError, ImportError, OSError) as error:
                traceback.print_exc()
                run.results.setdefault("failed_parts", {})[part] = f"{error}"[:500]
                records = []
            for line in lines_of(records) if part != "gate" else gate_lines(run):
                _say(line)
            _say(f"-- {part}: {time.monotonic() - started:.0f} s")
            run.results.setdefault("part_seconds", {})[part] = time.monotonic() - started
            run.write(part)
    _finish(run)
    return 1 if run.wrong() or run.results.get("failed_parts") else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench_gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="folder for JSON and CSV")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, in their order")
    parser.add_argument("--seconds", type=float, default=520.0, help="all parts together")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument(
        "--commit",
        default=os.environ.get("PBS_COMMIT"),
        help="of the files, where the repository itself is not at hand; also PBS_COMMIT",
    )
    options = parser.parse_args(arguments)
    options.parts = [part.strip() for part in options.parts.split(",")]
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"unknown part {part!r}; valid: {', '.join(PARTS)}")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu --smoke tries the script without one")
    return options


def gate_lines(run: Run) -> list[str]:
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


def _finish(run: Run) -> None:
    """Break-even lengths, what was wrong, and where everything lies."""
    points = []
    for part in ("table7", "selection", "ttft"):
        for point in break_evens(run.results["parts"].get(part, [])):
            points.append({"part": part, **point})
    if points:
        table = pd.DataFrame(points)
        write_atomically(run.out / "break_even.csv", table.to_csv(index=False))
    run.results["wrong"] = run.wrong()
    run.write("")
    for line in _summary(run.results["parts"], points):
        _say(line)
    for line in run.results["wrong"]:
        _say(f"WRONG {line}")
    _say(f"{run.results['seconds']:.0f} s in all; results in {run.out}")


def _summary(parts: Record, points: Sequence[Record]) -> list[str]:
    """The numbers in short: a reply that carries only the end of the output has them."""
    lines = ["\n== summary: milliseconds, medians; x over each dense kernel"]
    published = {row.length: row for row in TABLE7}
    for part in ("table7", "ttft"):
        for record in parts.get(part, []):
            dense = {name: entry["median_ms"] for name, entry in record["dense"].items()}
            texts = [f"{part} N={record['length']} density {record['target_density']:.3f}"]
            texts += [f"{name} {_ms(value)}" for name, value in dense.items()]
            for label, entry in record["methods"].items():
                over = ", ".join(f"{x:.2f}x {n}" for n, x in entry.get("speed_up", {}).items())
                share = entry.get("share_of_dense_tflops")
                share_text = "" if share is None else f", kernel {share:.2f} of best dense"
                texts.append(f"{label} {_ms(entry['median_ms'])} ({over}{share_text})")
            if part == "table7" and record["length"] in published:
                row = published[record["length"]]
                texts.append(f"published {row.dense_ms} / {row.total_ms} ({row.speed_up:.2f}x)")
            texts += [record["failure"]["failure"]] if "failure" in record else []
            lines.append("; ".join(texts))
    last = next((r for r in reversed(parts.get("selection", [])) if r["methods"]), None)
    for label, entry in (last or {"methods": {}})["methods"].items():
        if entry["median_ms"] is None:
            lines.append(f"selection N={last['length']} {label}: {entry['failure']}")
            continue
        stages = ", ".join(f"{n} {_ms(x)}" for n, x in entry.get("stages_ms", {}).items())
        lines.append(
            f"selection N={last['length']} {label}: density {entry['density']:.3f}, total "
            f"{_ms(entry['median_ms'])}, {stages}"
        )
    for point in points:
        if point["dense"] == "fastest":
            where = "none" if point["break_even"] is None else f"{point['break_even']:.0f}"
            lines.append(f"break-even {point['part']} {point['method']}: {where}")
    return lines


def _ms(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - the report itself


if __name__ == "__main__":
    sys.exit(main())

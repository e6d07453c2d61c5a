"""``make bench``: minutes on a CPU. The gate, then attention at 4K to 16K beside PyTorch's SDPA.

python -m experiments.tools.bench_cpu --out outputs/bench_cpu
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.timing.attention_timing import measure_cell
from experiments.timing.cost_model import Rates, Shape
from experiments.timing.dense_kernels import dense_kernels
from experiments.timing.inputs import Cell, Record
from experiments.timing.stopwatch import Effort
from experiments.timing.timing_report import lines_of
from experiments.tools.bench_parts import gate_lines, gate_part
from experiments.tools.bench_run import BenchRun, Plan
from pbs.methods import build_method

# The target: this much faster than SDPA at this length and density, in the median of five calls.
TARGET_LENGTH = 16384
TARGET_DENSITY = 0.25
TARGET_SPEED_UP = 2.0
# Extra memory of a call, its output included, over q, k, v and the output.
TARGET_MEMORY = 1.5
SHAPE = Shape(4, 4, 64, 4)


def measure_target(
    length: int = TARGET_LENGTH, *, density: float = TARGET_DENSITY, rates: Rates | None = None
) -> Record:
    """PBS, order and selection included, beside SDPA in this process; five calls of each."""
    cell = Cell(SHAPE, length, torch.float32, torch.device("cpu"), "mixed", density)
    return measure_cell(
        cell,
        {"pbs": build_method("pbs"), "pbs shared": build_method("pbs", gqa="shared")},
        dense_kernels("cpu"),
        effort=Effort(0.01, 5, 5),
        rates=rates,
        coverage_rows=16,
        num_input_sets=1,
        stage_rounds=3,
    )


def target_lines(record: Record) -> list[str]:
    """Whether speed and memory are where they should be."""
    entry = record["methods"]["pbs"]
    if entry["median_ms"] is None:
        return [f"target not measured: {entry['failure']}: {entry['message']}"]
    speed_up, memory = entry["speed_up_over_fastest"], entry.get("peak_over_inputs")
    word = "met" if speed_up >= TARGET_SPEED_UP else "MISSED"
    lines = [
        f"target {word}: N={record['length']}, fp32, heads {SHAPE}, density "
        f"{entry['density']:.3f}: {speed_up:.2f}x SDPA "
        f"[{entry['speed_up_over_fastest_p20']:.2f}, {entry['speed_up_over_fastest_p80']:.2f}], "
        f"{entry['num_samples']} calls, order and selection included (at least {TARGET_SPEED_UP}x)"
    ]
    if memory is not None:
        word = "met" if memory < TARGET_MEMORY else "MISSED"
        lines.append(
            f"target {word}: peak extra memory {memory:.2f}x of q, k, v and output, output "
            f"included (below {TARGET_MEMORY}x)"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1: an output was wrong. A missed target is printed and is no failure here."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tools.bench_cpu", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=Path("outputs/bench_cpu"))
    parser.add_argument("--lengths", default="4096,8192,16384")
    options = parser.parse_args(arguments)
    lengths = [int(text) for text in options.lengths.split(",")]
    options.out.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        run = BenchRun(options.out, torch.device("cpu"), Plan.smoke(), commit=None)
        run.deadline = time.monotonic() + 60
        _say(f"{run.results['environment']['device']}\n\n== gate")
        gate_part(run)
        for line in gate_lines(run):
            _say(line)
        _say("\n== attention at density 0.25, heads 4/4/64, fp32")
        records = []
        for length in lengths:
            record = run.attempt(
                "attention",
                {"length": length},
                lambda length=length: measure_target(length, rates=run.rates),
            )
            records.append(record)
        for line in lines_of(records):
            _say(line)
        if "failure" not in records[-1] and lengths[-1] == TARGET_LENGTH:
            for line in target_lines(records[-1]):
                _say(line)
    wrong = run.wrong()
    for line in wrong:
        _say(f"WRONG {line}")
    _say(f"results in {run.out}")
    return 1 if wrong else 0


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - the report itself


if __name__ == "__main__":
    sys.exit(main())

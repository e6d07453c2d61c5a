"""``make bench-gpu``: every number that needs a GPU, by one command, in minutes.

Runs the correctness gate, Table 7 of the paper, the selection cost of every method with break-even
lengths, and the time to first token of Llama-3.1-8B with random weights. Needs no hydra, no wandb
and no network. Results are written after every cell, so that a time limit keeps what is done:
``results.json`` (everything, with all samples) and a CSV per part.

    python -m experiments.bench_gpu --out DIR [--parts gate,table7,selection,ttft] [--seconds 540]
    python -m experiments.bench_gpu --out DIR --device cpu --smoke     # tiny: does it run?
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from experiments.published import TABLE7
from experiments.speed.attention_inputs import Record
from experiments.speed.bench_parts import RUNNERS, gate_lines
from experiments.speed.bench_run import Plan, Run
from experiments.speed.timing_report import break_evens, lines_of
from experiments.store import write_atomically

PARTS = ("gate", "table7", "selection", "ttft")
# Shares of the time budget; what a part leaves goes to those after it.
SHARES = {"gate": 0.26, "table7": 0.26, "selection": 0.20, "ttft": 0.28}


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
    parser.add_argument("--seconds", type=float, default=540.0, help="all parts together")
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

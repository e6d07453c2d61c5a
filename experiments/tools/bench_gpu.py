"""``make bench-gpu``: every number that needs a GPU, by one command.

Runs the correctness gate, Table 7 of the paper, the selection cost of every method with break-even
lengths, and the time to first token of Llama-3.1-8B with random weights. Needs no hydra, no wandb
and no network. Results are written after every cell, so that a time limit keeps what is done:
``results.json`` (everything, with all samples) and a CSV per part. Several commands may fill one
folder with --add, part by part and length by length, on one device at one commit.

    python -m experiments.tools.bench_gpu --out DIR [--parts gate,table7,selection,ttft]
    python -m experiments.tools.bench_gpu --out DIR --add --parts ttft --lengths 131072
    python -m experiments.tools.bench_gpu --out DIR --device cpu --smoke     # tiny: does it run?
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from experiments.timing.inputs import Record
from experiments.timing.published import TABLE7
from experiments.timing.result_folders import TIMED_PARTS, break_even_rows
from experiments.timing.timing_report import lines_of, marks_of
from experiments.tools.bench_parts import RUNNERS, gate_lines
from experiments.tools.bench_run import BenchRun, Plan

PARTS = ("gate", "table7", "selection", "ttft")
# Shares of the time budget; what a part leaves goes to those after it.
SHARES = {"gate": 0.12, "table7": 0.22, "selection": 0.12, "ttft": 0.54}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1: an output was wrong, or a part failed as a whole; times then mean nothing.

    2: the folder holds results of another environment.
    """
    options = _parse(arguments)
    device = torch.device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        try:
            run = BenchRun(
                options.out, device, options.plan, commit=options.commit, adds=options.add
            )
        except ValueError as error:
            _say(f"{error}")
            return 2
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
            run.write()
    _finish(run)
    return 1 if run.wrong() or run.results.get("failed_parts") else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tools.bench_gpu", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="folder for JSON and CSV")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, in their order")
    parser.add_argument("--lengths", help="only these of the parts' lengths; gate has its own")
    parser.add_argument("--seconds", type=float, default=1200.0, help="all parts together")
    parser.add_argument("--add", action="store_true", help="keep what the folder has, and add")
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
    options.plan = Plan.smoke() if options.smoke else Plan()
    if options.lengths:
        options.plan = _shortened(options.plan, [int(n) for n in options.lengths.split(",")])
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu --smoke tries the script without one")
    return options


def _shortened(plan: Plan, lengths: Sequence[int]) -> Plan:
    """The plan with these lengths only."""
    names = [f"{part}_lengths" for part in TIMED_PARTS]
    kept = {name: tuple(n for n in getattr(plan, name) if n in lengths) for name in names}
    return replace(plan, **kept)


def _finish(run: BenchRun) -> None:
    """Break-even lengths, what was wrong, and where everything lies."""
    points = list(break_even_rows(run.results["parts"]))
    run.results["wrong"] = run.wrong()
    run.write()
    for line in _summary(run.results["parts"], points):
        _say(line)
    for line in run.results["wrong"]:
        _say(f"WRONG {line}")
    _say(f"{run.results['seconds']:.0f} s in all; results in {run.out}")


def _summary(parts: Record, points: Sequence[Record]) -> list[str]:
    """The numbers in short: a reply that carries only the end of the output has them."""
    lines = ["\n== summary: milliseconds, medians [p20, p80]; x over each dense kernel"]
    published = {row.length: row for row in TABLE7}
    for part in ("table7", "ttft"):
        for record in parts.get(part, []):
            texts = [f"{part} N={record['length']} density {record['target_density']:.3f}"]
            texts += [f"{name} {_time(entry)}" for name, entry in record["dense"].items()]
            for label, entry in record["methods"].items():
                over = ", ".join(f"{x:.2f}x {n}" for n, x in entry.get("speed_up", {}).items())
                share = entry.get("share_of_dense_tflops")
                share_text = "" if share is None else f", kernel {share:.2f} of best dense"
                texts.append(f"{label} {_time(entry)} ({over}{share_text})")
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
            f"{_time(entry)}, {stages}"
        )
    for point in points:
        if point["dense"] == "fastest":
            where = "none" if point["break_even"] is None else f"{point['break_even']:.0f}"
            count = f"at least {point['fewest_samples']} samples a time"
            lines.append(f"break-even {point['part']} {point['method']}: {where} ({count})")
    return lines


def _time(entry: Record) -> str:
    """Median, percentiles, count, what a caller waits, and what to know before believing it."""
    if entry["median_ms"] is None:
        return f"none ({entry['failure']})"
    has_ends = entry["p20_ms"] is not None
    ends = f" [{_ms(entry['p20_ms'])}, {_ms(entry['p80_ms'])}]" if has_ends else ""
    waits = f", waits {_ms(entry['wall_ms'])}" if entry.get("wall_ms") is not None else ""
    return f"{_ms(entry['median_ms'])}{ends} n={entry['num_samples']}{waits}{marks_of(entry)}"


def _ms(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - the report itself


if __name__ == "__main__":
    sys.exit(main())

"""``make leaderboard``: all finished runs as one CSV, each checked against its own raw samples.

python -m experiments.tools.leaderboard --outputs outputs --out outputs/leaderboard.csv
python -m experiments.tools.leaderboard --outputs outputs --check submitted.csv

A run enters only with a hash that its settings give and with the raw samples behind its numbers.
``--check`` holds the rows of a CSV, whoever wrote it, against the runs they name. Exit status 1: a
row was refused; the message names the run and says why.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd

from experiments.files import write_atomically
from experiments.report.runs import READ_ERRORS, Group, Problem, Results, Run, read_results
from experiments.report.table import Row, metrics_in

# How far a number may lie from the one its samples give: rounding, on the way through a CSV.
TOLERANCE = 1e-6

# What a row may not be without.
IDENTITY = ("bench", "model", "method", "hash")
NUMBERS = ("score", "density", "coverage", "speed_up")
COLUMNS = (
    "method",
    "setting",
    "model",
    "bench",
    "bench_setting",
    "score",
    "score_unit",
    "density",
    "coverage",
    "speed_up",
    "speed_up_low",
    "speed_up_high",
    "speed_up_at",
    "load",
    "num_samples",
    "num_truncated",
    "partial",
    "seed",
    "device",
    "commit",
    "is_dirty",
    "num_environments",
    "hash",
)


# Sorts the rows, best first; no column of the table.
RANK = "rank"


class RefusedError(ValueError):
    """A row that may not stand in a leaderboard; the message names its run and says why."""


def make_leaderboard(results: Results) -> tuple[pd.DataFrame, list[str]]:
    """All finished runs, best score first within a bench and model, and why others are refused.

    Columns ``COLUMNS``. ``score`` is the main metric of the bench, ``score_unit`` its name and unit
    (empty for benches of times and coverage), ``density`` and ``coverage`` are shares, ``speed_up``
    is over dense attention on the same device at ``speed_up_at`` tokens, from ``speed_up_low`` to
    ``speed_up_high`` (95 % over samples that both timed; percentiles over rounds for benches of
    times). ``load`` is the share of the processors that other processes kept busy meanwhile.
    """
    rows, refused = [], [f"{problem.folder}: {problem.reason}" for problem in _broken(results)]
    for group in results.groups:
        for run, row in zip(group.runs, group.rows, strict=True):
            try:
                check_run(run)
            except RefusedError as error:
                refused.append(str(error))
            else:
                rows.append(_row(group, run, row))
    frame = pd.DataFrame(rows, columns=[*COLUMNS, RANK])
    order = ["bench", "model", "bench_setting", RANK, "method", "setting"]
    return frame.sort_values(order, ignore_index=True).drop(columns=RANK), refused


def _broken(results: Results) -> list[Problem]:
    """Folders whose files contradict each other, such as samples edited after they were summed."""
    return [problem for problem in results.problems if problem.status == "broken"]


def check_run(run: Run) -> None:
    """Hold a run's hash against its settings, and its numbers against its raw samples.

    Raises:
        RefusedError: no hash or another one than the settings give, no raw samples or another
            number of them, or numbers that the samples do not give.
    """
    from experiments.run.runner import build_bench

    stated = run.metrics.get("hash")
    if not stated:
        _refuse(run.folder, "metrics.json has no config hash; run the same command again")
    if not stated == run.digest == run.cfg.hash:
        _refuse(
            run.folder,
            f"its config.yaml has the hash {run.cfg.hash}, its metrics.json {stated}, its folder "
            f"{run.digest}; all three must be equal: was one of them edited?",
        )
    samples = run.samples()
    if not samples:
        _refuse(run.folder, "samples.jsonl with the raw samples is missing or empty")
    total = run.metrics["results"]["total"]
    if len(samples) != total.get("num_samples", len(samples)):
        _refuse(
            run.folder,
            f"metrics.json speaks of {total['num_samples']} samples, samples.jsonl has "
            f"{len(samples)}",
        )
    try:
        bench = build_bench(run.cfg.bench)
        measured = bench.summarise(samples)["total"]
    except READ_ERRORS as error:
        reason = f"its samples cannot be summed up ({type(error).__name__}: {error})"
        raise RefusedError(f"{run.folder}: {reason}") from error
    names = dict.fromkeys(("accuracy", "score", *(metric.name for metric in bench.metrics)))
    for name in (*names, "density", "coverage", "prefill_seconds"):
        if not _is_equal(total.get(name), measured.get(name)):
            _refuse(
                run.folder,
                f"{name} is {total.get(name)} in metrics.json, {measured.get(name)} by its raw "
                "samples; the same command with resume=false measures it anew",
            )


def check_rows(rows: pd.DataFrame, results: Results) -> list[str]:
    """Hold the rows of a leaderboard against the runs they name; returns why rows are refused."""
    frame, refused = make_leaderboard(results)
    known = {tuple(str(row[key]) for key in IDENTITY): row for _, row in frame.iterrows()}
    found = []
    for number, row in enumerate(rows.to_dict("records"), start=2):  # line 1 has the names
        try:
            _check_row(row, known, refused, results.path)
        except RefusedError as error:
            found.append(f"line {number}: {error}")
    return found


def _check_row(
    row: Mapping[str, Any],
    known: Mapping[tuple[str, ...], pd.Series],
    refused: Sequence[str],
    outputs: Path,
) -> None:
    key = tuple("" if _is_missing(row.get(name)) else str(row[name]) for name in IDENTITY)
    folder = outputs.joinpath(*key)
    for name, value in zip(IDENTITY, key, strict=True):
        if not value:
            what = "config hash" if name == "hash" else name
            _refuse(folder, f"the row has no {what}; it cannot be traced to a run")
    if key not in known:
        own = [reason for reason in refused if reason.startswith(f"{folder}:")]
        if own:
            raise RefusedError(own[0])
        _refuse(
            folder, "no finished run with raw samples there; send the run's folder with the row"
        )
    for name in NUMBERS:
        if not _is_equal(row.get(name), known[key][name]):
            _refuse(folder, f"{name} is {row.get(name)} in the row, {known[key][name]} in the run")


def _row(group: Group, run: Run, row: Row) -> dict[str, Any]:
    metric = next(iter(metrics_in([row])), None)
    value = None if metric is None else row.get(metric.name)
    setting = run.label.removeprefix(run.method).strip()
    return {
        "method": run.method,
        "setting": setting or "default",
        "model": group.model,
        "bench": group.bench,
        "bench_setting": _bench_setting(run),
        "score": None if value is None else metric.factor * value,
        "score_unit": "" if value is None else metric.heading,
        RANK: math.inf if metric is None else metric.best_first(value),
        "density": row.get("density"),
        "coverage": row.get("coverage"),
        **{key: row.get(key) for key in ("speed_up", "speed_up_low", "speed_up_high", "load")},
        "speed_up_at": row.get("timed_length") if row.get("speed_up") else None,
        "num_samples": row.get("num_samples"),
        "num_truncated": row.get("num_truncated"),
        "partial": bool(run.metrics.get("partial")),
        "seed": run.cfg.seed,
        "device": run.metrics.get("device"),
        "commit": run.environment.get("commit"),
        "is_dirty": run.environment.get("is_dirty"),
        "num_environments": row["num_environments"],
        "hash": run.digest,
    }


def _bench_setting(run: Run) -> str:
    """The bench's parameters that are not at their defaults."""
    from experiments.settings.bench_names import BENCHES
    from experiments.settings.names import changed_parameters

    changed = changed_parameters(BENCHES, run.cfg.bench)
    return " ".join(f"{key}={value}" for key, value in changed.items()) or "default"


def _is_equal(stated: Any, measured: Any) -> bool:
    if _is_missing(stated) or _is_missing(measured):
        return _is_missing(stated) and _is_missing(measured)
    return math.isclose(float(stated), float(measured), rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _refuse(folder: Path, reason: str) -> NoReturn:
    raise RefusedError(f"{folder}: {reason}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0: every row stands; 1: some were refused; 2: a wrong argument."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tools.leaderboard", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="folder of the runs")
    parser.add_argument("--out", type=Path, help="the CSV; default: OUTPUTS/leaderboard.csv")
    parser.add_argument("--check", type=Path, help="check the rows of this CSV, write nothing")
    options = parser.parse_args(arguments)
    if not options.outputs.is_dir():
        parser.error(f"--outputs: {options.outputs} is no folder; expected the one that holds runs")
    results = read_results(options.outputs)
    if options.check is not None:
        try:
            rows = pd.read_csv(options.check, dtype=dict.fromkeys(IDENTITY, str))
        except (OSError, ValueError) as error:
            parser.error(f"--check: {options.check} cannot be read: {error}")
        refused = check_rows(rows, results)
        _say(f"{len(rows) - len(refused)} of {len(rows)} rows of {options.check} stand")
    else:
        out = options.out or options.outputs / "leaderboard.csv"
        frame, refused = make_leaderboard(results)
        write_atomically(out, frame.to_csv(index=False))
        num_without = len(results.problems) - len(_broken(results))
        without = f", {num_without} runs without a result left out" if num_without else ""
        _say(f"{len(frame)} rows: {out}{without}")
    for reason in refused:
        _say(f"refused: {reason}")
    return int(bool(refused))


def _say(line: str) -> None:
    print(line)  # noqa: T201 - the command's own output


if __name__ == "__main__":
    sys.exit(main())

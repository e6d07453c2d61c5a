"""The table a command ends with: one row per run, against dense attention on the same samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table

from experiments.files import write_atomically
from experiments.machine_load import load_warning
from experiments.metrics import ACCURACY, SCORE, Metric
from experiments.notes import describe_coverage, describe_truncation, notes_of
from experiments.report.compare import (
    compare_with_dense,
    config_of,
    dense_command,
    find_dense,
    is_plain_dense,
    samples_of,
)
from experiments.report.dense_times import compare_times
from experiments.report.markdown import print_markdown, terminal, to_markdown
from experiments.report.timing_table import speed_up_text, timing_columns, timing_numbers
from experiments.settings.bench_names import BENCHES
from experiments.settings.config import RunConfig, digest
from experiments.statistics import format_spread
from experiments.store import RunStore

Row = dict[str, Any]


def make_rows(cells: Sequence[Path], *, adds_dense: bool = True) -> list[Row]:
    """One row per run.

    Accuracy is compared with the plain dense run
    (:func:`experiments.report.compare.find_dense`), times with the fastest dense run of the same
    device and environment (:func:`experiments.report.dense_times.compare_times`), both on the
    samples that they share.

    Args:
        cells: run folders.
        adds_dense: also give the runs that accuracy is compared with, first, if they are not among
            the cells.
    """
    configs = {cell: config_of(cell) for cell in cells}
    references: dict[Path, RunConfig] = {}
    for cfg in configs.values() if adds_dense else ():
        dense = None if times_dense(cfg) else find_dense(cfg)
        if dense is not None and dense.folder not in configs:
            references[dense.folder] = config_of(dense.folder)
    configs = {**references, **configs}
    rows = [_row(cell, cfg) for cell, cfg in configs.items()]
    _tell_apart(rows, {str(cell): cfg for cell, cfg in configs.items()})
    return rows


def _row(folder: Path, cfg: RunConfig) -> Row:
    """The numbers of one run, whose configuration is ``cfg``."""
    store = RunStore(folder)
    metrics = store.metrics()
    row: Row = {
        "label": metrics.get("label", folder.parent.name),
        "method": folder.parent.name,
        "bench": cfg.bench["name"],
        "hash": folder.name,
        "status": metrics.get("status", "interrupted"),
        "partial": metrics.get("partial"),
        "error": (metrics.get("error") or {}).get("message"),
        "path": str(folder),
        "sample_set": cfg.sample_set,
        "num_environments": len(metrics.get("environments") or [None]),
        "is_reference": is_plain_dense(cfg.method),
        "dense_command": None,
    }
    match = metrics.get("match") or {}
    row |= {f"match_{key}": value for key, value in match.items()}
    if match.get("num_prompts"):
        row["held_out_basis"] = f"{match['num_prompts']} prompts that are not measured"
    if "results" in metrics:
        row["coverage_basis"] = describe_coverage(metrics["results"]["total"])
        row["truncated"] = describe_truncation(metrics["results"])
        row["num_truncated"] = metrics["results"]["total"].get("num_truncated")
    if times_dense(cfg) and "results" in metrics:
        row |= {"num_samples": metrics["results"]["total"]["num_samples"]}
        return row | timing_numbers(metrics["results"])
    if row["status"] != "finished":
        return row
    results = metrics["results"]
    length, timed = _longest(results)
    metrics_declared = BENCHES.load(cfg.bench["name"]).metrics
    keys = (key for metric in metrics_declared for key in metric.keys)
    totals = ("num_samples", *keys, "density", "coverage")
    row |= {key: results["total"].get(key) for key in totals} | {"load": metrics.get("load")}
    row |= {"timed_length": length, "num_timed": timed.get("num_samples")}
    times = ("prefill_seconds", "prefill_p20", "prefill_p80", "no_time")
    row |= {key: timed.get(key) for key in times}
    if not _is_compared(row):
        return row
    records = samples_of(store)
    dense = find_dense(cfg, records)
    if dense is None:
        row["dense_command"] = dense_command(cfg, metrics["overrides"])
        return row
    paired = compare_with_dense(cfg, records) or {}
    row |= {key: paired.get(key) for key in ("difference", "low", "high", "p_value")}
    row |= {key: paired.get(key) for key in ("num_pairs", "num_unpaired", "num_differing")}
    for name, values in (paired.get("metrics") or {}).items():
        row |= {f"{name}_{key}": values[key] for key in ("difference", "p_value")}
        row |= {f"{name}_difference_{key}": values[key] for key in ("low", "high")}
    row |= {"differing": ", ".join(paired.get("differing", ())), "dense_hash": paired.get("hash")}
    return row | compare_times(cfg, store, length)


def times_dense(cfg: RunConfig) -> bool:
    """Whether the run's bench times dense attention itself, in the cells of every method."""
    return BENCHES.load(cfg.bench["name"]).times_dense


def _tell_apart(rows: Sequence[Row], configs: Mapping[str, RunConfig]) -> None:
    """Add to equal labels what else differs between the runs, such as a swept seed."""
    flat = {path: flatten_settings(cfg) for path, cfg in configs.items()}
    for row in rows:
        twins = [other["path"] for other in rows if other["label"] == row["label"]]
        if len(twins) < 2 or any(path not in flat for path in twins):
            continue
        own = flat[row["path"]]
        differing = [key for key in own if len({flat[path].get(key) for path in twins}) > 1]
        row["suffix"] = " ".join(f"{key}={own[key]}" for key in differing)
    for row in rows:
        row["label"] = f"{row['label']} {row.pop('suffix', '')}".strip()


def flatten_settings(cfg: RunConfig) -> dict[str, str]:
    """Settings of model and bench, the seed and what files held, as text by their names."""
    tree = cfg.to_dict()
    checkpoint = tree["model"]["checkpoint"]
    if isinstance(checkpoint, Mapping):
        tree["model"]["checkpoint"] = digest(checkpoint)
    groups = {
        f"{name}.{key}": str(value)
        for name in ("model", "bench")
        for key, value in tree[name].items()
    }
    inputs = digest(cfg.inputs) if cfg.inputs else "none"
    return {**groups, "seed": str(cfg.seed), "inputs": inputs}


def _longest(results: Mapping[str, Any]) -> tuple[int | None, Mapping[str, Any]]:
    """The longest length and its numbers: times of different lengths are not to be mixed."""
    by_length = results.get("by_length") or {}
    if not by_length:
        return None, results["total"]
    length = max(by_length, key=int)
    return int(length), by_length[length]


def format_columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Heading to formatted cells, one per row."""
    if any(row.get("is_timing") for row in rows):
        return timing_columns(rows)
    lengths = {row["timed_length"] for row in rows if row.get("timed_length")}
    where = f" at {lengths.pop()} tokens" if len(lengths) == 1 else ""
    matched = {}
    if any(row.get("match_target") is not None for row in rows):
        matched["target: held-out, %"] = [_target(row) for row in rows]
    finished = [row for row in rows if row["status"] == "finished"]
    if finished and not any(_is_compared(row) for row in finished):
        return {
            "method": [row["label"] for row in rows],
            "density, %": [_percent(row, "density") or row["status"] for row in rows],
            "coverage, %": [_percent(row, "coverage") for row in rows],
        }
    is_timed = not finished or any(
        row.get(key) for row in rows for key in ("prefill_seconds", "no_time")
    )
    times = {f"prefill{where}, ms": [_time(row) for row in rows]}
    times |= {"speed-up over dense": [_speed_up(row) for row in rows]}
    return {
        "method": [row["label"] for row in rows],
        **_metric_columns(rows),
        **matched,  # asked for beside reached
        "density, %": [_percent(row, "density") for row in rows],
        "coverage, %": [_percent(row, "coverage") for row in rows],
        **(times if is_timed else {}),
    }


def metrics_in(rows: Sequence[Row]) -> list[Metric]:
    """The metrics of the rows' bench that a table shows: those that any row has.

    Of accuracy and score only one: the score where some run has no accuracy. Without any result the
    first that the bench declares.
    """
    name = next((row["bench"] for row in rows if row.get("bench")), None)
    declared = BENCHES.load(name).metrics if name else (ACCURACY, SCORE)
    if {ACCURACY, SCORE} <= set(declared):
        has_scores = any(
            row.get("score") is not None and row.get("accuracy") is None for row in rows
        )
        dropped = ACCURACY if has_scores else SCORE
        declared = tuple(metric for metric in declared if metric != dropped)
    found = [one for one in declared if any(row.get(one.name) is not None for row in rows)]
    return found or list(declared[:1])


def _metric_columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Every metric, and beside it its difference to dense if it is paired."""
    columns = {}
    for number, metric in enumerate(metrics_in(rows)):
        columns[metric.heading] = [_value(row, metric) for row in rows]
        if metric.is_paired:
            which = "" if number == 0 else f"{metric.name}: "
            unit = f", {metric.difference_unit}" if metric.difference_unit else ""
            name = f"{which}difference to dense{unit}"
            columns[name] = [_difference(row, metric, is_first=number == 0) for row in rows]
    return columns


def _is_compared(row: Row) -> bool:
    """Whether the run has metrics or times that a dense run can be set beside."""
    metrics = [metric.name for metric in metrics_in([row]) if metric.is_paired]
    names = (*metrics, "prefill_seconds")
    return any(row.get(name) is not None for name in names)


def _target(row: Row) -> str:
    """What the knob was to reach, and what it reached on the prompts it was set on."""
    if row.get("match_target") is None:
        return ""
    target = f"{row['match_quantity']} {100 * row['match_target']:g}"
    return f"{target}: {'' if row['match_is_met'] else 'nearest '}{100 * row['match_held_out']:.1f}"


def _value(row: Row, metric: Metric) -> str:
    if row["status"] != "finished":
        return row["status"]
    if row.get(metric.name) is None:
        return "–"
    return metric.text(*(row.get(key) for key in metric.keys))


def _percent(row: Row, key: str) -> str:
    if row["status"] != "finished":
        return ""
    return "–" if row.get(key) is None else f"{100 * row[key]:.1f}"


def _difference(row: Row, metric: Metric, *, is_first: bool) -> str:
    if row["status"] != "finished":
        return ""
    if row["is_reference"]:
        return "reference"
    own = f"{metric.name}_difference"
    names = ("difference", "low", "high") if is_first else (own, f"{own}_low", f"{own}_high")
    difference, low, high = (row.get(name) for name in names)
    if difference is None:
        return "no dense run" if row["dense_command"] else _unpaired(row)
    return metric.difference_text(difference, low, high)


def _unpaired(row: Row) -> str:
    return "other inputs" if row.get("num_differing") else "–"


def _time(row: Row) -> str:
    if row.get("prefill_seconds") is None:
        return "–" if row.get("no_time") else ""
    times = (row[key] for key in ("prefill_seconds", "prefill_p20", "prefill_p80"))
    return format_spread(lambda time: f"{1000 * time:.0f}", *times, row["num_timed"])


def _speed_up(row: Row) -> str:
    if row.get("speed_up"):
        return speed_up_text(row)
    return "–" if row.get("no_speed_up") or row.get("no_time") else ""


def reading_notes(rows: Sequence[Row]) -> list[str]:
    """How the table is to be read: what is compared with what, and why a number is missing."""
    notes = []
    if any(row.get("difference") is not None for row in rows):
        notes.append(
            "difference to dense: to the plain dense run (flash, every parameter at its default) "
            "of the same model, sample by sample where both were asked the same"
        )
    over = sorted({row["speed_up_over"] for row in rows if row.get("speed_up_over")})
    if over:
        notes.append(
            f"speed-up: over {' or '.join(over)}, the fastest dense run of the same device and "
            "environment that timed the same samples; the median of the ratios sample by sample, "
            "its 95 % interval (order statistics) and the number of samples; what changed between "
            "the two runs is not in it"
        )
    answering = [row for row in rows if row.get("num_samples") and not row.get("is_timing")]
    if len({row["sample_set"] for row in answering}) > 1:
        notes.append(
            "the rows are of different samples: compare accuracies through the difference to dense"
        )
    for row in rows:
        notes += [f"{row['label']}: {text}" for text in _remarks(row)]
    return notes + notes_of(rows)


def _remarks(row: Row) -> list[str]:
    """What one row does not show."""
    texts = []
    if row.get("num_differing"):
        texts.append(
            f"inputs differ: {row['num_differing']} samples were asked something else in the dense "
            f"run and are not compared ({row['differing']}{', ...' * (row['num_differing'] > 5)})"
        )
    if row.get("num_unpaired"):
        texts.append(
            f"compared on {row['num_pairs']} samples; {row['num_unpaired']} are not in the dense "
            "run"
        )
    if row["num_environments"] > 1:
        texts.append(
            f"its samples come from {row['num_environments']} environments (env.json; each sample "
            "names its own)"
        )
    if not row.get("is_timing"):
        for name in ("load", "dense_load"):
            warning = load_warning(row.get(name))
            of = "" if name == "load" else "in the dense run "
            texts += [f"{of}{warning}"] if warning else []
    if row.get("no_time") and not row.get("is_timing"):  # timing_notes says it there
        texts.append(f"no time: {row['no_time']}")
    elif row.get("no_speed_up"):
        texts.append(f"no speed-up: {row['no_speed_up']}")
    return texts


def show(group: Path, rows: Sequence[Row]) -> None:
    """The table on stdout; in a narrow terminal intervals and headings take lines of their own."""
    console = terminal()
    columns = format_columns(rows)
    longest = [max(map(len, (name, *cells))) for name, cells in columns.items()]
    is_narrow = console.width < 130 or sum(longest) + 2 * len(longest) > console.width
    table = Table(
        title=title_of(group, rows),
        title_justify="left",
        box=None if is_narrow else SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    # One column more, and longer names: the headings make room.
    is_wide = "target: held-out, %" in columns or len(columns) > 10
    for index, name in enumerate(columns):
        heading = name.replace(" ", "\n") if is_narrow or is_wide else name
        if index == 0:
            table.add_column(heading, overflow="fold", min_width=min(16, longest[0]))
        else:
            table.add_column(heading, justify="right", no_wrap=True)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*(cell.replace(" [", "\n[") if is_narrow else cell for cell in cells))
    console.print(table)
    lengths = length_columns(rows)
    if lengths:
        print_markdown(to_markdown(lengths))


def length_columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Each run's numbers at each length, where there are several: metric, density, time."""
    found = {
        row["path"]: RunStore(Path(row["path"])).metrics()["results"].get("by_length") or {}
        for row in rows
        if row["status"] == "finished" and not row.get("is_timing")
    }
    lengths = sorted({length for entries in found.values() for length in entries}, key=int)
    metrics = metrics_in(rows)
    if len(lengths) < 2 or not metrics:
        return {}
    metric = metrics[0]
    some = [row for row in rows if row["path"] in found]
    columns = {f"{metric.name}; density, %; prefill, ms": [row["label"] for row in some]}
    for length in lengths:
        entries = [found[row["path"]].get(length) or {} for row in some]
        columns[f"{length} tokens"] = [_at_length(metric, entry) for entry in entries]
    return columns


def _at_length(metric: Metric, entry: Mapping[str, Any]) -> str:
    if not entry:
        return ""
    value, density, time = (entry.get(x) for x in (metric.name, "density", "prefill_seconds"))
    return "; ".join(
        [
            "–" if value is None else metric.text(value),
            "–" if density is None else f"{100 * density:.1f}",
            "–" if time is None else f"{1000 * time:.0f}",
        ]
    )


def title_of(group: Path, rows: Sequence[Row]) -> str:
    """Bench, model and number of samples."""
    counts = sorted({row["num_samples"] for row in rows if row.get("num_samples")})
    word = "cells" if any(row.get("is_timing") for row in rows) else "samples"
    samples = f"{' or '.join(map(str, counts)) or 'no'} {word} a method"
    partial = ", partial: a part of the bench only" if any(r["partial"] for r in rows) else ""
    return f"{group.parent.name} on {group.name}, {samples}{partial}"


def write(group: Path, rows: Sequence[Row]) -> None:
    """The table as CSV with the raw numbers, and as Markdown, there a table per set of samples."""
    write_atomically(group / "summary.csv", pd.DataFrame(rows).to_csv(index=False))
    by_set: dict[str, list[Row]] = {}
    for row in rows:
        by_set.setdefault(row["sample_set"], []).append(row)
    texts = []
    for name, part in by_set.items():
        note = f", samples {name}" if len(by_set) > 1 else ""
        lines = [f"{title_of(group, part)}{note}", to_markdown(format_columns(part))]
        remarks = "\n".join(f"- {text}" for text in reading_notes(part))
        texts.append("\n\n".join(filter(None, [*lines, remarks])))
    write_atomically(group / "summary.md", "\n\n".join(texts) + "\n")

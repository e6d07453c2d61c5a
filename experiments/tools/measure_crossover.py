"""Writes the crossover table of ``method.dense_below=auto`` from results of ``make bench-gpu``.

    python -m experiments.tools.measure_crossover experiments/measured/h100_2026-11-26

Only the part "selection" decides, in which each method computes what it selects itself: times at a
density that was set (the paper's, in "table7") say nothing about a method that selects more. Rows
of other devices, head shapes and settings stay.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from experiments.files import write_atomically
from experiments.store import Record
from experiments.timing.result_folders import ResultFolder, read_folder
from experiments.timing.timing_report import break_evens, shape_of
from experiments.tools.bench import own_methods
from pbs.methods import build_method
from pbs.methods.crossover import COLUMNS, PACKAGED, Crossover, read_table, setting_of

PART = "selection"


def crossovers(folder: ResultFolder) -> list[Crossover]:
    """One row per method at its setting and head shape; calls that were cold are left out.

    Raises:
        ValueError: the results have no times of methods that select themselves.
    """
    records = [one for one in folder.parts.get(PART, ()) if one["target_density"] is None]
    rows = [
        _row(folder, point, records)
        for point in break_evens(records)
        if point["dense"] == "fastest"
    ]
    if not rows:
        raise ValueError(
            f"{folder.path}: no part of these results tells a crossover; expected {PART}, in which "
            "methods compute what they select: run `make bench-gpu`"
        )
    return sorted(rows, key=lambda row: row.key)


def _row(folder: ResultFolder, point: Mapping[str, Any], records: Sequence[Record]) -> Crossover:
    """A break-even length, with what was measured next to it."""
    never = point["break_even"] is None
    min_keys = point["longest"] + 1 if never else round(point["break_even"])
    timed = {
        record["length"]: record
        for record in records
        if shape_of(record) == point["shape"]
        and record["methods"].get(point["method"], {}).get("median_ms") is not None
    }
    at = min((n for n in timed if n >= min_keys), default=max(timed))
    record = timed[at]
    entry = record["methods"][point["method"]]
    q_heads, kv_heads, head_dim = map(int, point["shape"].split("/"))
    return Crossover(
        device=folder.device,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        method=_setting(folder, point["method"]),
        min_keys=min_keys,
        measured_keys=at,
        density=round(entry["density"], 4),
        method_ms=round(entry["median_ms"], 4),
        dense_ms=round(record["dense"][record["fastest_dense"]]["median_ms"], 4),
        num_samples=point["fewest_samples"],
        inputs=f"{record['structure']} inputs, sharpness {record['sharpness']:g}",
        source=str(record["commit"])[:7],
    )


def _setting(folder: ResultFolder, label: str) -> str:
    """What a label of the results stands for; older results name no parameters."""
    if label in folder.methods:
        method = folder.methods[label]
        return setting_of(build_method(method["method"], **method["params"]))
    settings = dict(own_methods()[label])
    return setting_of(build_method(settings.pop("name"), **settings))


def merge(earlier: Iterable[Crossover], rows: Iterable[Crossover]) -> list[Crossover]:
    """All rows; of two about the same device, heads and setting, the new one."""
    merged = {row.key: row for row in (*earlier, *rows)}
    return [merged[key] for key in sorted(merged)]


def to_csv(rows: Iterable[Crossover]) -> str:
    """The table as text."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([column.name for column in COLUMNS])
    writer.writerows(map(astuple, rows))
    return text.getvalue()


def main(arguments: list[str] | None = None) -> None:
    """Read results, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("results", type=Path, nargs="+", help="folders of results")
    parser.add_argument("--out", type=Path, default=PACKAGED)
    options = parser.parse_args(arguments)
    rows = [row for path in options.results for row in crossovers(read_folder(path))]
    earlier = read_table(options.out) if options.out.exists() else []
    merged = merge(earlier, rows)
    write_atomically(options.out, to_csv(merged))
    kept = len(merged) - len({row.key for row in rows})
    print(f"{len(merged)} rows in {options.out}, {kept} of them kept")  # noqa: T201 - its result


if __name__ == "__main__":
    main()

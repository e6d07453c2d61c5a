"""Folders of results that a GPU or another machine has made, and their tables.

A folder is one by what lies in it: the run folders of ``make bench-gpu``, or, from before that was
a loop over ordinary benches, ``results.json`` and further ``results_*.json`` of commands that
measured a part. The raw samples in them are the truth; the CSVs beside them follow, with cold
samples left out:

    python -m experiments.timing.result_folders FOLDER [FOLDER ...]     # write the CSVs anew
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.files import write_atomically
from experiments.timing.samples import without_cold_samples
from experiments.timing.timing_report import break_evens, table_rows

Record = dict[str, Any]

COMMITTED = Path(__file__).resolve().parents[1] / "measured"
# Samples of the runs in a folder: <bench>/<model>/<method>/<hash>.
RUNS = "*/*/*/*/samples.jsonl"
BENCHES = ("gate", "attention", "ttft")
# Parts that hold times; "gate" holds errors alone.
TIMED_PARTS = ("table7", "selection", "ttft")
# What names a cell; another record of the same takes its place.
CELL = ("length", "q_heads", "kv_heads", "head_dim", "dtype", "structure", "sharpness")
CELL += ("target_density",)
# The gate calls everything once, to see whether it is right: its columns have no times.
GATE_COLUMNS = (
    *CELL,
    *("kind", "variant", "density", "dense_reason", "error", "allowed_error", "relative_error"),
    *("rows_checked", "peak_bytes", "failure", "message"),
)


@dataclass(frozen=True)
class ResultFolder:
    """What one folder holds.

    Attributes:
        path: the folder.
        environment: of its ``results.json``, or of the first file there is.
        parts: records by part, cold samples left out; each says the commit it was measured with.
        methods: "method" and "params" of each label; empty for results that do not say.
    """

    path: Path
    environment: Mapping[str, Any] = field(repr=False)
    parts: Mapping[str, Sequence[Record]] = field(repr=False)
    methods: Mapping[str, Mapping[str, Any]] = field(repr=False)

    @property
    def device(self) -> str:
        """What it was measured on."""
        return str(self.environment["device"])


def read_folder(path: Path) -> ResultFolder:
    """Read all results of a folder.

    Raises:
        FileNotFoundError: there are none.
        ValueError: two of its files come from different devices, or one is something else.
    """
    files = sorted(path.glob("results*.json"), key=lambda file: (file.name != "results.json", file))
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    for file, results in zip(files, found, strict=True):
        if not {"environment", "parts"} <= results.keys():
            raise ValueError(f"{file} has no environment or no parts: it is not of make bench-gpu")
    found += [_results_of_run(file.parent) for file in sorted(path.glob(RUNS))]
    if not found:
        raise FileNotFoundError(f"{path} has no results; `make bench-gpu` makes some")
    devices = sorted({results["environment"]["device"] for results in found})
    if len(devices) > 1:
        raise ValueError(
            f"{path} mixes results of {' and '.join(devices)}; give each device a folder of its own"
        )
    parts: dict[str, list[Record]] = {}
    for results in sorted(found, key=lambda one: one["environment"]["time"]):
        commit = results["environment"].get("commit")
        for part, records in results["parts"].items():
            if part not in (*TIMED_PARTS, "gate"):
                continue
            for record in records:
                add_record(parts.setdefault(part, []), {"commit": commit, **record})
    for part in TIMED_PARTS:
        parts[part] = [without_cold_samples(record) for record in parts.get(part, ())]
    methods = {label: method for one in found for label, method in one.get("methods", {}).items()}
    return ResultFolder(path, found[0]["environment"], parts, methods)


def _results_of_run(folder: Path) -> Record:
    """A run folder as a ``results.json`` of one part."""
    import yaml

    from experiments.settings.names import describe
    from experiments.store import RunStore

    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    environment = json.loads((folder / "env.json").read_text(encoding="utf-8"))
    records = RunStore(folder).samples()
    bench, beside = config["bench"], config["bench"].get("beside") or {}
    part = bench["name"]
    if part == "attention":
        part = "selection" if bench["densities"] is None else "table7"
    methods = {describe(config["method"]): config["method"], **beside}
    return {
        "environment": environment,
        "parts": {part: records},
        "methods": {
            label: {
                "method": settings["name"],
                "params": {key: value for key, value in settings.items() if key != "name"},
            }
            for label, settings in methods.items()
        },
    }


def add_record(records: list[Record], record: Record) -> None:
    """Put a record in the place of an earlier one of the same cell, or at the end.

    One that failed as a whole, or was skipped, takes no measured one's place.
    """
    key = cell_of(record)
    for index, other in enumerate(records):
        if cell_of(other) == key:
            if "failure" not in record or "failure" in other:
                records[index] = record
            return
    records.append(record)


def cell_of(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a record measures."""
    return tuple(record.get(name) for name in CELL)


def result_folders(root: Path = COMMITTED) -> list[ResultFolder]:
    """All folders of results below ``root``, whatever they are called, oldest first."""
    paths = {file.parent for file in root.glob("*/results*.json")}
    paths |= {file.parents[4] for file in root.glob(f"*/{RUNS}") if file.parts[-5] in BENCHES}
    folders = [read_folder(path) for path in sorted(paths)]
    return sorted(folders, key=lambda one: (one.environment["time"], one.path.name))


def newest_folders(root: Path = COMMITTED, *, part: str | None = None) -> list[ResultFolder]:
    """The newest folder of each device, by the names of the devices.

    Args:
        root: where the folders lie.
        part: only folders that have measured this part.
    """
    newest = {
        folder.device: folder
        for folder in result_folders(root)
        if part is None or any(one["methods"] for one in folder.parts.get(part, ()))
    }
    return [newest[device] for device in sorted(newest)]


def write_tables(path: Path, parts: Mapping[str, Sequence[Record]]) -> None:
    """A CSV per part, and ``break_even.csv``; records as :func:`read_folder` gives them."""
    import pandas as pd

    for part, records in parts.items():
        rows = [row for record in records for row in table_rows(record)]
        if part == "gate":
            rows = [{key: row.get(key) for key in GATE_COLUMNS} for row in rows]
        if rows:
            write_atomically(path / f"{part}.csv", pd.DataFrame(rows).to_csv(index=False))
    points = list(break_even_rows(parts))
    if points:
        write_atomically(path / "break_even.csv", pd.DataFrame(points).to_csv(index=False))


def break_even_rows(parts: Mapping[str, Sequence[Record]]) -> Iterator[Record]:
    """Break-even lengths of all parts with times."""
    for part in TIMED_PARTS:
        for point in break_evens(parts.get(part, ())):
            yield {"part": part, **point}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the CSVs of folders anew."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("folders", type=Path, nargs="+", help="folders of results")
    for path in parser.parse_args(arguments).folders:
        folder = read_folder(path)
        write_tables(path, folder.parts)
        dropped = sum(
            len(entry.get("dropped_ms", ()))
            for part in TIMED_PARTS
            for record in folder.parts.get(part, ())
            for entry in (*record["dense"].values(), *record["methods"].values())
        )
        print(f"{path}: tables written, {dropped} cold calls left out")  # noqa: T201 - its result


if __name__ == "__main__":
    main()

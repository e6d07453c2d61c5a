"""Times of the benches ``attention`` and ``ttft``, from runs and from committed results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from experiments.config import ROOT
from experiments.report.runs import Group, Results
from experiments.speed.timing_report import STAGES, break_evens, shape_of, table_rows
from experiments.statistics import format_spread
from experiments.store import Record

COMMITTED = ROOT / "experiments" / "results"
# Parts of a committed ``results.json`` that hold times.
PARTS = ("table7", "selection", "ttft")


@dataclass(frozen=True)
class Times:
    """Times that may stand in one table: one bench, one device.

    Attributes:
        title: a heading.
        device: what they were measured on.
        records: as of ``attention_timing.measure_cell`` or ``prefill_timing.measure_prefill``.
    """

    title: str
    device: str
    records: tuple[Record, ...] = field(repr=False)


def times_of(group: Group) -> list[Times]:
    """The times of a group, apart by device."""
    by_device: dict[str, list[Record]] = {}
    for run in group.runs:
        device = str(run.metrics.get("device"))
        by_device.setdefault(device, []).extend(_complete(run.samples()))
    return [
        Times(group.title, device, tuple(records))
        for device, records in by_device.items()
        if records
    ]


def all_times(results: Results) -> list[Times]:
    """All times of an outputs folder."""
    return [times for group in results.timing for times in times_of(group)]


def committed_times(folder: str | Path | None = None) -> list[Times]:
    """The times in ``experiments/results`` that come with the project, the newest of each device.

    Args:
        folder: one of its folders; default: the newest of every GPU.
    """
    folders = [Path(folder)] if folder is not None else newest_committed()
    found = []
    for path in folders:
        results = json.loads((path / "results.json").read_text())
        extra = path / "results_ttft.json"
        parts = dict(results["parts"])
        if extra.is_file():
            parts |= json.loads(extra.read_text())["parts"]
        device = results["environment"]["device"]
        for part in PARTS:
            records = tuple(_complete(parts.get(part, [])))
            if records:
                found.append(Times(f"{part}, {path.name}", device, records))
    return found


def newest_committed() -> list[Path]:
    """Folders ``<device>_<date>`` of ``experiments/results``, the newest of each device."""
    newest: dict[str, Path] = {}
    for path in sorted(COMMITTED.glob("h*_*"), key=lambda path: path.name.rpartition("_")[2]):
        if (path / "results.json").is_file():
            newest[path.name.rpartition("_")[0]] = path
    return list(newest.values())


def times_frame(times: Times) -> pd.DataFrame:
    """One row per length, shape and variant (dense kernels and methods), without raw samples.

    Beside the columns of :func:`experiments.speed.timing_report.table_rows`: ``method``, the name
    that the variant's label begins with, and ``shape``, heads as Hq/Hkv/D.
    """
    rows = [
        {**row, "shape": shape_of(record), "cell": index}
        for index, record in enumerate(times.records)
        for row in table_rows(record)
    ]
    frame = pd.DataFrame(rows)
    frame["method"] = frame["variant"].str.partition(" ")[0]
    needed = ("median_ms", "floor_ms", "density", "coverage", "speed_up_over_fastest", "failure")
    needed += tuple(f"{stage}_ms" for stage in STAGES)
    return frame.reindex(columns=[*frame.columns, *(n for n in needed if n not in frame)])


def timing_table(times: Times) -> pd.DataFrame:
    """Times in ms, formatted: median [p20, p80] or (n = 2), how it compares, and what it did."""
    frame = times_frame(times)
    columns = {
        "tokens": frame["length"].astype(str),
        "heads": frame["shape"].fillna("model"),
        "variant": frame["variant"].where(frame["kind"] != "dense", "dense " + frame["variant"]),
        "ms": [
            format_spread(_ms, row.median_ms, row.p20_ms, row.p80_ms, int(row.num_rounds))
            if pd.notna(row.median_ms)
            else str(row.failure)
            for row in frame.itertuples()
        ],
        "over fastest dense": _format(frame["speed_up_over_fastest"], "{:.2f}x"),
        "density": _format(frame["density"], "{:.3f}"),
        "coverage": _format(frame["coverage"], "{:.3f}"),
        "times its floor": _format(frame["median_ms"] / frame["floor_ms"], "{:.1f}"),
        **{
            f"{stage}, ms": ["" if pd.isna(ms) else _ms(ms) for ms in frame[f"{stage}_ms"]]
            for stage in STAGES
        },
    }
    table = pd.DataFrame(columns)
    empty = [name for name in table if not (set(table[name]) - {"", "model"})]
    return table.drop(columns=empty)


def break_even_table(times: Times) -> pd.DataFrame | str:
    """From which length on each method is faster than each dense kernel."""
    points = break_evens(times.records)
    if not points:
        return "No method ran sparse here."
    frame = pd.DataFrame(points)
    where = [
        "not reached"
        if pd.isna(point.break_even)
        else f"at or below {point.shortest}"
        if point.break_even == point.shortest
        else f"{point.break_even:.0f}"
        for point in frame.itertuples()
    ]
    columns = {
        "heads": frame["shape"],
        "density": frame["target_density"],
        "method": frame["method"],
        "over dense": frame["dense"],
        "break-even, tokens": where,
        "speed-up at the longest": frame["speed_up_at_longest"].map("{:.2f}x".format),
        "longest": frame["longest"],
    }
    table = pd.DataFrame(columns)
    return table.drop(columns=[name for name in ("heads", "density") if table[name].isna().all()])


def _ms(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _format(values: pd.Series, pattern: str) -> list[str]:
    return ["" if pd.isna(value) else pattern.format(value) for value in values]


def _complete(records: Sequence[Record]) -> list[Record]:
    """Records of cells that were measured; a cell that failed as a whole has no variants."""
    return [record for record in records if record.get("methods")]

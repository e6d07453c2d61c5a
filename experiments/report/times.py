"""Times of the benches ``attention`` and ``ttft``, from runs and from committed results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from experiments.machine_load import load_warning
from experiments.statistics import format_spread
from experiments.store import Record
from experiments.timing.result_folders import TIMED_PARTS, newest_folders, read_folder
from experiments.timing.samples import without_cold_samples
from experiments.timing.timing_report import STAGES, break_evens, marks_of, shape_of, table_rows

if TYPE_CHECKING:
    from experiments.report.runs import Group, Results


@dataclass(frozen=True)
class Times:
    """Times that may stand in one table: one bench, one device.

    Attributes:
        title: a heading.
        device: what they were measured on, all in one environment.
        records: as of ``attention_timing.measure_cell`` or ``prefill_timing.measure_prefill``.
    """

    title: str
    device: str
    records: tuple[Record, ...] = field(repr=False)


def times_of(group: Group) -> list[Times]:
    """The times of a group, apart by device and by environment: code, packages and threads.

    Where a device has several environments the title names which, by the id that env.json has.
    """
    found: dict[tuple[str, str], list[Record]] = {}
    for run in group.runs:
        device = str(run.metrics.get("device"))
        for record in _complete(run.samples()):
            key = (device, str(record.get("environment", "")))
            found.setdefault(key, []).append(without_cold_samples(record))
    devices = [device for device, _ in found]
    return [
        Times(
            f"{group.title}, environment {name}" if devices.count(device) > 1 else group.title,
            device,
            tuple(records),
        )
        for (device, name), records in found.items()
    ]


def all_times(results: Results) -> list[Times]:
    """All times of an outputs folder."""
    return [times for group in results.timing for times in times_of(group)]


def committed_times(folder: str | Path | None = None) -> list[Times]:
    """The times in ``experiments/measured`` that come with the project, the newest of each device.

    Cold samples are left out, see :mod:`experiments.timing.samples`.

    Args:
        folder: one of its folders; default: the newest of every device, whatever its name.
    """
    folders = newest_folders() if folder is None else [read_folder(Path(folder))]
    found = []
    for one in folders:
        for part in TIMED_PARTS:
            records = tuple(_complete(one.parts.get(part, ())))
            if records:
                found.append(Times(f"{part}, {one.path.name}", one.device, records))
    return found


def times_frame(times: Times) -> pd.DataFrame:
    """One row per length, shape and variant (dense kernels and methods), without raw samples.

    Beside the columns of :func:`experiments.timing.timing_report.table_rows`: ``method``, the name
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
    needed += ("wall_ms", "wall_p20_ms", "wall_p80_ms", "wall_speed_up_over_fastest")
    needed += ("relative_error", "peak_bytes", "total_bytes_by_rank", "communication_share")
    needed += ("dense_reason", "message")
    needed += ("speed_up_over_fastest_p20", "speed_up_over_fastest_p80", "num_stage_samples")
    return frame.reindex(columns=[*frame.columns, *(n for n in needed if n not in frame)])


def timing_table(times: Times) -> pd.DataFrame:
    """Times in ms, formatted: median [p20, p80] or (n = 2), how it compares, and what it did.

    "samples" are the calls behind a time, "waits" what a caller waits for one (empty where that was
    not measured), "stage samples" the calls behind the stages.
    """
    frame = times_frame(times)
    columns = {
        "tokens": frame["length"].astype(str),
        "heads": frame["shape"].fillna("model"),
        "variant": frame["variant"].where(frame["kind"] != "dense", "dense " + frame["variant"]),
        "ms": [
            format_spread(_ms, row.median_ms, row.p20_ms, row.p80_ms, int(row.num_samples))
            if pd.notna(row.median_ms)
            else str(row.failure)
            for row in frame.itertuples()
        ],
        "samples": [_count(row) for row in frame.to_dict("records")],
        "waits, ms": [
            interval_text(row.wall_ms, row.wall_p20_ms, row.wall_p80_ms)
            for row in frame.itertuples()
        ],
        "over fastest dense": [
            interval_text(ratio, low, high, "{:.2f}x".format)
            for ratio, low, high in zip(
                *(frame[f"speed_up_over_fastest{end}"] for end in ("", "_p20", "_p80")),
                strict=True,
            )
        ],
        "waiting, over fastest dense": _format(frame["wall_speed_up_over_fastest"], "{:.2f}x"),
        "density": _format(frame["density"], "{:.3f}"),
        "coverage": _format(frame["coverage"], "{:.3f}"),
        "times its floor": _format(frame["median_ms"] / frame["floor_ms"], "{:.1f}"),
        **{
            f"{stage}, ms": ["" if pd.isna(ms) else _ms(ms) for ms in frame[f"{stage}_ms"]]
            for stage in STAGES
        },
        "stage samples": _format(frame["num_stage_samples"], "{:.0f}"),
        "relative error": _format(frame["relative_error"], "{:.0e}"),
        "memory, MiB": _format(frame["peak_bytes"] / 2**20, "{:.0f}"),
        "GiB by process": [_by_process(value) for value in frame["total_bytes_by_rank"]],
        "communication, %": _format(100 * frame["communication_share"], "{:.0f}"),
        "ran dense": frame["dense_reason"].fillna(""),
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
        "fewest samples a time": frame["fewest_samples"],
    }
    table = pd.DataFrame(columns)
    return table.drop(columns=[name for name in ("heads", "density") if table[name].isna().all()])


def load_note(times: Times) -> str:
    """A sentence if others kept the machine busy in some of the cells; "" if not."""
    loads = [one["load"] for one in times.records if one.get("load") is not None]
    return (load_warning(max(loads)) or "") if loads else ""


def _ms(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def interval_text(value: float, low: float, high: float, show: Callable[[float], str] = _ms) -> str:
    """A value with its ends in brackets; "" if there is none."""
    if pd.isna(value):
        return ""
    return show(value) + ("" if pd.isna(low) else f" [{show(low)}, {show(high)}]")


def _by_process(value: Sequence[float | None] | float) -> str:
    """Memory of each of the processes that share a model."""
    if not isinstance(value, list):
        return ""
    return ", ".join("?" if one is None else f"{one / 2**30:.2f}" for one in value)


def _count(row: Record) -> str:
    """How many, and what to know before they are believed."""
    return "" if pd.isna(row["median_ms"]) else f"{row['num_samples']:.0f}{marks_of(row)}"


def _format(values: pd.Series, pattern: str) -> list[str]:
    return ["" if pd.isna(value) else pattern.format(value) for value in values]


def _complete(records: Sequence[Record]) -> list[Record]:
    """Records of cells that were measured; a cell that failed as a whole has no variants."""
    return [record for record in records if record.get("methods")]

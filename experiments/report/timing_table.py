"""The closing table of ``bench=attention`` and ``bench=ttft``; the paper's Table 7 beside ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.files import write_atomically
from experiments.machine_load import load_warning
from experiments.notes import listed
from experiments.report.device_tables import TITLE7, as_text, beside_table7, table7_frame
from experiments.report.times import Times
from experiments.statistics import format_spread
from experiments.store import RunStore
from experiments.timing.timing_report import marks_of, shape_of

Row = dict[str, Any]

MIB = 2**20
NOTE = (
    "brackets: 20th to 80th percentile, of speed-ups over the ratios round by round; (n = 2): only "
    "the median, of too few times for percentiles; samples: calls behind each number, dense alike; "
    "dense: the fastest dense kernel of the same cell, interleaved; waits: what a caller waits for "
    "one synchronised call, on a CPU the time itself; break-even: length from which on the method "
    "is faster than dense"
)


def timing_numbers(results: Mapping[str, Any]) -> Row:
    """What stands for a run in the closing table: its longest cell with a time.

    Args:
        results: of ``metrics.json``, as of
            :func:`experiments.timing.timing_report.summarise_times`.
    """
    cells = [cell for cell in results["cells"] if not cell.get("is_beside")]
    timed = [cell for cell in cells if cell["prefill_seconds"] is not None]
    row: Row = {"is_timing": True, "num_failed": results["total"]["num_failed"]}
    row |= {"break_even": results["total"].get("break_even")}
    row |= {"no_time": "; ".join(_failures(cells))}
    if not timed:
        return row
    cell = max(timed, key=lambda one: one["length"])
    fastest = cell.get("fastest_dense")
    kept = ("prefill_seconds", "prefill_p20", "prefill_p80", "density", "coverage", "floor_ms")
    kept += ("median_ms", "wall_ms", "wall_p20_ms", "wall_p80_ms", "is_warm", "load")
    row |= {key: cell.get(key) for key in kept}
    row |= {
        "coverage_basis": _coverage_basis(cell),
        "timed_length": cell["length"],
        "shape": shape_of(cell),
        "target_density": cell.get("target_density"),
        "dense": fastest,
        "dense_ms": cell.get(f"dense_{fastest}_ms"),
        "num_timed": cell["num_samples"],
        "speed_up": cell.get("speed_up_over_fastest"),
        "speed_up_low": cell.get("speed_up_over_fastest_p20"),
        "speed_up_high": cell.get("speed_up_over_fastest_p80"),
        "wall_speed_up": cell.get("wall_speed_up_over_fastest"),
        "relative_error": cell.get("relative_error"),
        "peak_bytes": cell.get("peak_bytes"),
        "communication_share": cell.get("communication_share"),
        "dense_reason": cell.get("dense_reason"),
        "has_break_even": "break_even" in results["total"],
    }
    return row


def _coverage_basis(cell: Mapping[str, Any]) -> str | None:
    """On what a cell's coverage was measured."""
    if not cell.get("coverage_rows"):
        return None
    heads = listed(cell["coverage_heads"])
    return f"the first inputs of each cell, heads {heads}, {cell['coverage_rows']} queries of each"


def _failures(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why cells have no time: "out of memory at 524288 tokens"."""
    return [
        f"{cell['failure']} at {cell['length']} tokens: {cell['message']}"
        for cell in cells
        if cell["prefill_seconds"] is None
    ]


def timing_columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Heading to formatted cells, one per run; headings that nothing stands under are left out."""
    columns = {
        "method": [row["label"] for row in rows],
        "tokens": [_text(row, "timed_length") for row in rows],
        "heads": [_text(row, "shape") for row in rows],
        "asked density, %": [_percent(row, "target_density") for row in rows],
        "time, ms": [_time(row) for row in rows],
        "dense, ms": [_dense(row) for row in rows],
        "samples": [_text(row, "num_timed") for row in rows],
        "speed-up": [speed_up_text(row) for row in rows],
        **(_waits(rows) if any(map(_differs, rows)) else {}),
        "density, %": [_percent(row, "density") for row in rows],
        "coverage, %": [_percent(row, "coverage") for row in rows],
        "relative error": [_number(row, "relative_error", "{:.1e}") for row in rows],
        "memory, MiB": [_number(row, "peak_bytes", "{:.0f}", 1 / MIB) for row in rows],
        "floor, ms": [_number(row, "floor_ms", "{:.3g}") for row in rows],
        "communication, %": [_percent(row, "communication_share") for row in rows],
        "break-even, tokens": [_break_even(row) for row in rows],
    }
    return {name: texts for name, texts in columns.items() if any(texts)}


def timing_notes(rows: Sequence[Row]) -> list[str]:
    """What the closing table does not say: failures that are results, and rules that ran dense."""
    notes = [NOTE]
    for row in rows:
        if row.get("num_timed"):
            marks = marks_of({**row, "num_samples": row["num_timed"]})
            notes += [f"{row['label']} at {row['timed_length']} tokens:{marks}"] if marks else []
        warning = load_warning(row.get("load"))
        notes += [f"{row['label']}: {warning}"] if warning else []
    notes += [f"no time: {row['label']}: {row['no_time']}" for row in rows if row.get("no_time")]
    notes += [
        f"ran dense: {row['label']} at {row['timed_length']} tokens: {row['dense_reason']}"
        for row in rows
        if row.get("dense_reason")
    ]
    return notes


def write_table7(group: Path, rows: Sequence[Row]) -> list[Path]:
    """The paper's Table 7 with our times beside it, as CSV and Markdown.

    Args:
        group: folder to write ``table7.csv`` and ``table7.md`` to.
        rows: runs of the table.

    Returns:
        The files; none if no cell has the paper's heads, dtype and density.
    """
    times = [
        Times(row["label"], row.get("device") or "", tuple(RunStore(Path(row["path"])).samples()))
        for row in rows
    ]
    frames = [table7_frame(one).assign(run=one.title) for one in times]
    frames = [frame for frame in frames if len(frame)]
    if not frames:
        return []
    frame = pd.concat(frames).sort_values(["length", "run"], kind="stable")
    write_atomically(group / "table7.csv", frame.to_csv(index=False))
    texts = [f"{source}\n\n{as_text(*found)}" for source, *found in beside_table7(times)]
    write_atomically(group / "table7.md", "\n\n".join([f"{TITLE7}.", *texts]) + "\n")
    return [group / "table7.md", group / "table7.csv"]


def _text(row: Row, key: str) -> str:
    return "" if row.get(key) is None else str(row[key])


def _percent(row: Row, key: str) -> str:
    return "" if row.get(key) is None else f"{100 * row[key]:.1f}"


def _number(row: Row, key: str, pattern: str, factor: float = 1.0) -> str:
    return "" if row.get(key) is None else pattern.format(factor * row[key])


def _time(row: Row) -> str:
    """Three digits: an op takes microseconds, a prefill seconds."""
    if row.get("prefill_seconds") is None:
        return row["status"] if row["status"] != "finished" else "none"
    times = (row[key] for key in ("prefill_seconds", "prefill_p20", "prefill_p80"))
    return format_spread(lambda time: f"{1000 * time:.4g}", *times, row["num_timed"])


def speed_up_text(row: Row) -> str:
    """A ratio with its ends and, where it has pairs, their number: "1.33x [1.20, 1.41] (25)"."""
    if row.get("speed_up") is None:
        return ""
    text = f"{row['speed_up']:.2f}x"
    if row.get("speed_up_low") is not None:
        text += f" [{row['speed_up_low']:.2f}, {row['speed_up_high']:.2f}]"
    return text + (f" ({row['speed_up_pairs']})" if row.get("speed_up_pairs") else "")


def _differs(row: Row) -> bool:
    """Whether a caller waits longer than the device works; on a CPU both are one clock."""
    return row.get("wall_ms") is not None and row["wall_ms"] != row.get("median_ms")


def _waits(rows: Sequence[Row]) -> dict[str, list[str]]:
    waits = []
    for row in rows:
        ends = [row.get(f"wall_{name}_ms") for name in ("p20", "p80")]
        brackets = "" if None in ends else f" [{', '.join(f'{end:.4g}' for end in ends)}]"
        wait = row.get("wall_ms")
        waits.append("" if wait is None else f"{wait:.4g}{brackets}")
    ratios = [_number(row, "wall_speed_up", "{:.2f}x") for row in rows]
    return {"waits, ms": waits, "speed-up of waiting": ratios}


def _dense(row: Row) -> str:
    return f"{row['dense_ms']:.4g} ({row['dense']})" if row.get("dense_ms") is not None else ""


def _break_even(row: Row) -> str:
    if not row.get("has_break_even"):
        return ""
    return "not reached" if row["break_even"] is None else f"{row['break_even']:.0f}"

"""Timing records as rows and summaries, with break-even lengths."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from experiments.statistics import FEWEST_FOR_PERCENTILES
from experiments.timing.published import TABLE7
from experiments.timing.samples import FEW_SAMPLES

Record = dict[str, Any]

STAGES = ("order", "selection", "gather", "attention")
# Lists of raw samples, which tables leave to the file they come from.
SAMPLES = ("samples_ms", "wall_samples_ms", "dropped_ms")


def summarise_times(records: Sequence[Record], beside: Collection[str] = ()) -> dict[str, Any]:
    """What a bench's ``summarise`` returns.

    Args:
        records: as of ``attention_timing.measure_cell`` or ``prefill_timing.measure_prefill``.
        beside: labels of methods that are not the run's own: cells say so ("is_beside"), totals
            are without them.
    """
    every = [cell for record in records for cell in _cells(record)]
    for cell in every:
        cell["is_beside"] = cell["variant"] in beside
    cells = [cell for cell in every if not cell["is_beside"]]
    timed = [cell for cell in cells if cell["prefill_seconds"] is not None]
    lengths = [cell["length"] for cell in timed]
    total = {
        "num_samples": len(records),
        "num_failed": len(cells) - len(timed),
        "num_truncated": sum(record.get("num_truncated", 0) for record in records),
        "density": _mean(cell.get("density") for cell in timed),
        "coverage": _mean(cell.get("coverage") for cell in timed),
    }
    for point in break_evens(records):
        if point["dense"] == "fastest":
            if point["method"] not in beside:
                total["break_even"] = point["break_even"]
            for cell in every:
                if _is_point_of(point, cell):
                    cell["break_even"] = point["break_even"]
    return {
        "total": total,
        # Cells of one length and several shapes or densities do not make one time.
        "by_length": {
            str(cell["length"]): cell for cell in timed if lengths.count(cell["length"]) == 1
        },
        "cells": every,
        "break_even": break_evens(records),
    }


def _is_point_of(point: Record, cell: Record) -> bool:
    """Whether a break-even length is that of a cell's method, heads and density."""
    is_density = point["target_density"] in (None, cell.get("target_density"))
    return is_density and point["method"] == cell["variant"] and point["shape"] == shape_of(cell)


def failures_of(records: Sequence[Record]) -> dict[str, dict[str, str]]:
    """What makes a run a failed one, by length and variant, as ``Bench.failures`` has it.

    Wrong outputs and errors do. Too little memory and kernels that are not there are results like
    others, unless no method has any time.
    """
    found: dict[str, dict[str, str]] = {}
    num_timed = 0
    for record in records:
        whole = {"inputs": record["failure"]} if "failure" in record else {}
        num_timed += sum(entry["median_ms"] is not None for entry in record["methods"].values())
        for name, entry in {**record["dense"], **record["methods"], **whole}.items():
            if entry["median_ms"] is None:
                found[f"N={record['length']} {name}"] = {
                    "type": entry["failure"],
                    "message": entry["message"],
                    "traceback": "",
                }
    if not num_timed:
        return found
    return {name: one for name, one in found.items() if one["type"] in ("incorrect", "error")}


def break_even(points: Sequence[tuple[int, float]]) -> float | None:
    """The length from which on a method is faster than dense.

    Args:
        points: lengths with speed-ups.

    Returns:
        Where the speed-up crosses 1 for the last time, interpolated between lengths on a
        logarithmic scale; the shortest length if it is never below 1; None if it is below 1 at the
        longest, or there is no point.
    """
    points = sorted(points)
    if not points or points[-1][1] < 1:
        return None
    result = float(points[0][0])
    for (short, slower), (long, faster) in pairwise(points):
        if slower < 1 <= faster:
            share = -math.log(slower) / (math.log(faster) - math.log(slower))
            result = short * (long / short) ** share
    return result


def break_evens(records: Sequence[Record]) -> list[Record]:
    """Break-even length of every method over every dense kernel and the fastest.

    Separate for head shapes, and for chosen densities unless each length has one of its own. Cells
    in which a method ran dense by its own rule, or was never warm, are left out. Each says how many
    samples the least measured of the times behind it has.
    """
    by_length: dict[int, set[Any]] = {}
    for record in records:
        by_length.setdefault(record["length"], set()).add(record.get("target_density"))
    has_several = any(len(densities) > 1 for densities in by_length.values())
    points: dict[tuple[Any, ...], list[tuple[int, float]]] = {}
    counts: dict[tuple[Any, ...], list[int]] = {}
    for record in records:
        dense = record["dense"]
        density = record.get("target_density") if has_several else None
        for label, entry in record["methods"].items():
            if entry["median_ms"] is None or entry["dense_reason"]:
                continue
            over = {**entry["speed_up"], "fastest": entry["speed_up_over_fastest"]}
            for name, value in over.items():
                if value is not None:
                    key = (shape_of(record), density, label, name)
                    points.setdefault(key, []).append((record["length"], value))
                    kernel = record.get("fastest_dense") if name == "fastest" else name
                    two = (entry, dense.get(kernel, {}))
                    counts.setdefault(key, []).extend(len(e.get("samples_ms", ())) for e in two)
    return [
        {
            "shape": shape,
            "target_density": density,
            "method": label,
            "dense": name,
            "break_even": break_even(values),
            "shortest": min(values)[0],
            "longest": max(values)[0],
            "speed_up_at_longest": max(values)[1],
            "fewest_samples": min(counts[shape, density, label, name]),
        }
        for (shape, density, label, name), values in points.items()
    ]


def shape_of(record: Mapping[str, Any]) -> str | None:
    """Heads of a cell as Hq/Hkv/D; None for a whole model."""
    if "q_heads" not in record:
        return None
    return f"{record['q_heads']}/{record['kv_heads']}/{record['head_dim']}"


def table_rows(record: Record) -> list[Record]:
    """A cell as flat rows for a table, one per dense kernel and per method, samples left out."""
    nested = {"stages_ms": "ms", "stage_floors_ms": "floor_ms"}
    ratios = ("speed_up", "speed_up_p20", "speed_up_p80", "wall_speed_up")
    left_out = {"first_ms", "stage_samples_ms", "dense_calls", *SAMPLES, *ratios, *nested}
    cell = {
        key: value
        for key, value in record.items()
        if key not in {"dense", "methods"} and not isinstance(value, dict)
    }
    rows = []
    for kind, group in (("dense", record["dense"]), ("method", record["methods"])):
        for label, entry in group.items():
            row = {**cell, "kind": kind, "variant": label}
            row |= {key: value for key, value in entry.items() if key not in left_out}
            row["num_samples"] = len(entry.get("samples_ms", ()))
            row["num_dropped"] = len(entry.get("dropped_ms", ()))
            if row["num_samples"] < FEWEST_FOR_PERCENTILES:
                row |= {name: None for name in ("p20_ms", "p80_ms") if name in row}
            for key, suffix in nested.items():
                row |= {f"{name}_{suffix}": v for name, v in entry.get(key, {}).items()}
            for key in ratios:
                row |= {f"{key}_{name}": v for name, v in entry.get(key, {}).items()}
            rows.append(row)
    if not rows:
        rows.append({**cell, **record.get("failure", {}), "kind": "cell", "variant": "inputs"})
    return rows


def write_times(records: Sequence[Record], path: Path) -> None:
    """All rows as CSV."""
    import pandas as pd

    from experiments.files import write_atomically

    rows = [row for record in records for row in table_rows(record)]
    write_atomically(path, pd.DataFrame(rows).to_csv(index=False))


def _cells(record: Record) -> list[Record]:
    """One row per method, with dense times beside it."""
    rows = []
    dense = {f"dense_{n}_ms": entry["median_ms"] for n, entry in record["dense"].items()}
    for row in table_rows(record):
        if row["kind"] == "dense":
            continue
        seconds = {
            target: None if row.get(source) is None else row[source] / 1e3
            for target, source in (
                ("prefill_seconds", "median_ms"),
                ("prefill_p20", "p20_ms"),
                ("prefill_p80", "p80_ms"),
            )
        }
        rows.append({"task": shape_of(record) or "prefill", **row, **dense, **seconds})
    return rows


def marks_of(row: Mapping[str, Any]) -> str:
    """What a reader must know before a time is believed: few samples, never warm; "" if nothing."""
    marks = []
    if row["num_samples"] < FEW_SAMPLES:
        marks.append(f"few samples: {row['num_samples']}")
    if row.get("is_warm") is False:
        marks.append("its calls never came to agree")
    return f"  ({'; '.join(marks)})" if marks else ""


def has_published_times(record: Record) -> bool:
    """Whether the paper's Table 7 has a row for this cell."""
    is_paper = shape_of(record) == "32/8/128" and record.get("dtype") == "bfloat16"
    return is_paper and any(row.length == record["length"] for row in TABLE7)


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None

"""Times of one device as a table: a row a length, dense kernels beside ours, the paper's Table 7.

The README, the report's page, the closing table of a command and ``make bench-gpu`` show this one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import pandas as pd

from experiments.report.markdown import to_markdown
from experiments.report.times import Times, times_frame
from experiments.store import Record
from experiments.timing.published import TABLE7, density_at
from experiments.timing.samples import FEW_SAMPLES
from experiments.timing.timing_report import has_published_times, shape_of

# Behind a density that the paper does not state.
UNSTATED = "*"
# Dense kernels, as far as they were there, and ours; other labels stand as they are.
DENSE = {"flash": "FA2", "cudnn": "cuDNN", "fa3": "FA3", "fa4": "FA4", "cpu": "SDPA"}
OURS = {
    "pbs": "PBS per head",
    "pbs shared": "PBS shared",
    "pbs fp8": "PBS per head, FP8",
    "pbs shared fp8": "PBS shared, FP8",
}
# Times at another density say nothing about the published ones.
DENSITY_TOLERANCE = 0.01
TITLE7 = (
    "Attention alone beside Table 7 of the PBS paper (arXiv 2510.21270; H100, FlashAttention-2 as "
    "dense)"
)
PUBLISHED = {row.length: f"{row.dense_ms}, {row.total_ms}" for row in TABLE7}


def device_table(
    records: Sequence[Record], *, unit: str = "ms", has_published: bool = False
) -> dict[str, list[str]]:
    """Heading to formatted cells, a row for each cell that has a time.

    Args:
        records: as of ``attention_timing.measure_cell`` or ``prefill_timing.measure_prefill``.
        unit: of the times, "ms" or "s".
        has_published: the paper's numbers in a last column; all records have some.
    """
    measured = _measured(records)
    kernels = {name for record in measured for name in record["dense"]}
    dense = [*(name for name in DENSE if name in kernels), *sorted(kernels - {*DENSE})]
    labels = _timed_labels(measured)
    best = _fastest(measured[-1], labels)
    rows = [_cells(record, dense, labels, best, 1000 if unit == "s" else 1) for record in measured]
    titles = ["tokens", "density", "samples", "spread, %"]
    titles += [f"{DENSE.get(name, name)}, {unit}" for name in dense]
    titles += [f"{OURS.get(label, label)}, {unit}" for label in labels]
    short = OURS.get(best, best).removeprefix("PBS ")
    titles += [f"{short} over {DENSE.get(name, name)}" for name in dense]
    columns = {title: [row[index] for row in rows] for index, title in enumerate(titles)}
    if has_published:
        columns["published FA2, PBS, ms"] = [PUBLISHED[one["length"]] for one in measured]
    return columns


def legend(records: Sequence[Record]) -> str:
    """What brackets are, what marks mean, as far as they are there."""
    measured = _measured(records)
    entries = [e for r in measured for e in (*r["dense"].values(), *r["methods"].values())]
    waits = any(entry.get("wall_ms") is not None for entry in entries)
    parts = [
        "Samples: calls behind each number; fewer than "
        f"{FEW_SAMPLES} are marked as few. Spread: the largest distance between 20th and 80th "
        "percentile of a row's times, in % of the median."
    ]
    if shape_of(measured[0]) is None:
        parts.append("Times end when the first token is read.")
    elif waits:
        parts.append(
            "Times are the device's own; in brackets what a caller waits for one synchronised call."
        )
    else:
        parts.append("Times are the device's own; what a caller waits was not measured.")
    if not all(map(_is_stated, measured)):
        parts.append(f"{UNSTATED} The paper states no density here; that of 131072 tokens is used.")
    parts += [f"No time: {text}." for text in _untimed(measured)]
    return " ".join(parts)


def beside_table7(times: Iterable[Times]) -> Iterator[tuple[str, dict[str, list[str]], str]]:
    """Attention alone at the lengths, heads and densities of the paper's Table 7, beside it.

    Yields:
        Source, table and legend of all times that have such cells.
    """
    for one in times:
        records = [record for record in one.records if _is_of_table7(record)]
        if _measured(records):
            table = device_table(records, has_published=True)
            yield f"{one.title}, {one.device}", table, legend(records)


def table7_frame(times: Times) -> pd.DataFrame:
    """The same as numbers: a row for each variant, published times beside it."""
    records = tuple(record for record in times.records if _is_of_table7(record))
    frame = times_frame(Times(times.title, times.device, records)) if records else pd.DataFrame()
    for row in TABLE7:
        is_here = frame["length"] == row.length if len(frame) else []
        for name in ("dense_ms", "permute_ms", "select_ms", "attention_ms", "total_ms", "speed_up"):
            if any(is_here):
                frame.loc[is_here, f"published_{name}"] = getattr(row, name)
    return frame


def as_text(table: dict[str, list[str]], note: str) -> str:
    """Table and legend as Markdown."""
    return f"{to_markdown(table)}\n\n{note}"


def _timed_labels(measured: Sequence[Record]) -> list[str]:
    """Methods that have a time somewhere, ours first and in their order."""
    labels = dict.fromkeys(
        label
        for record in measured
        for label, entry in record["methods"].items()
        if entry["median_ms"] is not None
    )
    return [*(label for label in OURS if label in labels), *(x for x in labels if x not in OURS)]


def _fastest(record: Record, labels: Sequence[str]) -> str:
    """The method with the least time in a cell, among those in the precision of dense kernels."""
    same = [label for label in labels if not label.endswith(" fp8")] or labels
    times = {label: record["methods"].get(label, {}).get("median_ms") for label in same}
    return min(times, key=lambda label: float("inf") if times[label] is None else times[label])


def _untimed(measured: Sequence[Record]) -> list[str]:
    """Methods without any time, and why: "PBS calibrated: unavailable, ..."."""
    timed = _timed_labels(measured)
    reasons = {
        label: f"{label}: {entry['failure']}, {entry.get('message', 'no reason recorded')}"
        for record in measured
        for label, entry in record["methods"].items()
        if label not in timed
    }
    return list(reasons.values())


def _measured(records: Sequence[Record]) -> list[Record]:
    """Cells in which some method has a time, short ones first."""
    measured = [
        record
        for record in records
        if any(entry["median_ms"] is not None for entry in record["methods"].values())
    ]
    return sorted(measured, key=lambda one: one["length"])


def _is_of_table7(record: Record) -> bool:
    """Whether it is a cell of the paper's, at its density."""
    density = record.get("target_density")
    if not has_published_times(record) or density is None:
        return False
    return abs(density - density_at(record["length"])[0]) <= DENSITY_TOLERANCE


def _is_stated(record: Record) -> bool:
    """Whether the paper states the density of this length."""
    if record.get("target_density") is None:
        return True
    return bool(record.get("is_published_density", density_at(record["length"])[1]))


def _cells(
    record: Record, dense: Sequence[str], labels: Sequence[str], best: str, divisor: int
) -> list[str]:
    """One length."""
    empty: Record = {"median_ms": None, "failure": "not measured"}
    entries = [record["dense"].get(name, empty) for name in dense]
    entries += [record["methods"].get(label, empty) for label in labels]
    timed = [entry for entry in entries if entry["median_ms"] is not None]
    counts = sorted({len(entry["samples_ms"]) for entry in timed})
    spread = [
        100 * (entry["p80_ms"] - entry["p20_ms"]) / entry["median_ms"]
        for entry in timed
        if len(entry["samples_ms"]) > 1 and entry["p20_ms"] is not None
    ]
    waits = shape_of(record) is not None
    is_few = counts[0] < FEW_SAMPLES
    is_cold = any(entry.get("is_warm") is False for entry in timed)
    marks = f"{' (few)' if is_few else ''}{' (never warm)' if is_cold else ''}"
    density = record["target_density"]
    if density is None:
        densities = [entry["density"] for entry in record["methods"].values() if "density" in entry]
        density = densities[-1]
    return [
        f"{record['length']}",
        f"{density:.3f}{'' if _is_stated(record) else UNSTATED}",
        f"{' to '.join(str(counts[end]) for end in ((0, -1) if len(counts) > 1 else (0,)))}{marks}",
        f"{max(spread):.1f}" if len(spread) == len(timed) else "unknown",
        *(_time_text(entry, divisor, waits) for entry in entries),
        *(_ratio_text(record["methods"].get(best, empty), name, waits) for name in dense),
    ]


def _time_text(entry: Record, divisor: int, has_wait: bool) -> str:
    """The device's time, and in brackets what a caller waits, where that was measured."""
    if entry["median_ms"] is None:
        return str(entry["failure"])
    wait = entry.get("wall_ms") if has_wait else None
    waits = "" if wait is None else f" ({wait / divisor:.2f})"
    return f"{entry['median_ms'] / divisor:.2f}{waits}"


def _ratio_text(entry: Record, name: str, has_wait: bool) -> str:
    """The ratio of the device's times, and in brackets that of what a caller waits."""
    ratio = entry.get("speed_up", {}).get(name)
    wait = entry.get("wall_speed_up", {}).get(name) if has_wait else None
    return ("" if ratio is None else f"{ratio:.2f}x") + ("" if wait is None else f" ({wait:.2f}x)")

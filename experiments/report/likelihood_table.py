"""What runs of ``bench=likelihood`` say, a row a run; KL also as a difference to PBS by window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.benches.likelihood import ALL
from experiments.report.pictures.looks import look_of
from experiments.statistics import student_interval
from experiments.store import Record, RunStore

# The method that the others are set beside.
OURS = "pbs"


def likelihood_table(folders: Sequence[Path], target: float | None = None) -> dict[str, list[str]]:
    """Heading to formatted cells, by length and KL; dense first.

    Args:
        folders: finished runs of one model.
        target: only runs that were set to this density, and dense.
    """
    runs = [(RunStore(folder), RunStore(folder).metrics()) for folder in folders]
    kept = [
        (store, metrics)
        for store, metrics in runs
        if metrics["method"] == "flash"
        or target is None
        or (metrics.get("match") or {}).get("target") == target
    ]
    ours = {
        cell["length"]: store.samples()
        for store, metrics in kept
        if metrics["method"] == OURS
        for cell in metrics["results"]["cells"]
    }
    rows = [
        _row(metrics, cell, store.samples(), ours.get(cell["length"], ()))
        for store, metrics in kept
        for cell in metrics["results"]["cells"]
        if cell["band"] == ALL
    ]
    rows.sort(key=lambda row: (row["length"], row["kl"]))
    headings = [name for name in (rows[0] if rows else {}) if name not in ("length", "kl")]
    return {name: [row[name] for row in rows] for name in headings}


def _row(
    metrics: Mapping[str, Any],
    cell: Mapping[str, Any],
    samples: Sequence[Record],
    ours: Sequence[Record],
) -> dict[str, Any]:
    return {
        "length": cell["length"],
        "kl": cell["kl"],
        "tokens": str(cell["length"]),
        "method": look_of(metrics["method"]).label,
        "density, %": f"{100 * cell['density']:.1f}",
        "KL to dense, nats": _interval(cell, "kl", "{:.4f}"),
        "KL less that of PBS": "" if metrics["method"] == OURS else difference(samples, ours),
        "NLL difference, nats": _interval(cell, "nll_difference", "{:+.4f}"),
        "same first choice, %": f"{100 * cell['top1_same']:.1f}",
        "coverage, %": f"{100 * cell['coverage']:.1f}",
        "coverage, 1st percentile of rows, %": f"{100 * cell['coverage_p1']:.1f}",
        "windows": str(cell["num_samples"]),
    }


def difference(samples: Sequence[Record], others: Sequence[Record]) -> str:
    """Mean difference of the KL over the windows that both have, with its 95 % interval."""
    by_window = {one["sample_id"]: one["kl"] for one in others}
    pairs = [
        one["kl"] - by_window[one["sample_id"]] for one in samples if one["sample_id"] in by_window
    ]
    if len(pairs) < 2:
        return ""
    ends = student_interval(pairs)
    return f"{sum(pairs) / len(pairs):+.4f} [{ends.low:+.4f}, {ends.high:+.4f}]"


def _interval(cell: Mapping[str, Any], name: str, pattern: str) -> str:
    ends = [cell.get(f"{name}_{end}") for end in ("low", "high")]
    text = pattern.format(cell[name])
    return text if None in ends else f"{text} [{', '.join(map(pattern.format, ends))}]"

"""Tables over the runs of a group, as pandas frames for notebooks and the report."""

from __future__ import annotations

from typing import Any

import pandas as pd

from experiments.metrics import SCORE, Metric
from experiments.report.runs import Group, Results
from experiments.report.table import Row, format_columns, metrics_in
from experiments.settings.config import DENSE

# Columns of cells in :func:`winners` that are no names of theirs.
MEASURED = ("label", "method", "samples", "value", "density")
# Columns of :func:`overview`.
OVERVIEW = ("bench", "model", "settings", "runs", "methods", "samples", "devices")


def overview(results: Results) -> pd.DataFrame:
    """One row per group: what was run."""
    rows = [
        {
            "bench": group.bench,
            "model": group.model,
            "settings": group.note,
            "runs": len(group.runs),
            "methods": ", ".join(dict.fromkeys(run.method for run in group.runs)),
            "samples": sum(row.get("num_samples") or 0 for row in group.rows),
            "devices": ", ".join(sorted({str(run.metrics.get("device")) for run in group.runs})),
        }
        for group in results.groups
    ]
    return pd.DataFrame(rows, columns=list(OVERVIEW))


def score_table(group: Group) -> pd.DataFrame:
    """The table a command ends with, formatted; its index numbers the runs in the pictures."""
    frame = pd.DataFrame(format_columns(group.rows))
    # A bench without answers has no score, one without attention mass no coverage.
    empty = [name for name in frame if not (set(frame[name]) - {"", "–", "reference"})]
    frame = frame.drop(columns=[name for name in empty if name != "method"])
    frame.index = pd.RangeIndex(1, len(frame) + 1, name="#")
    return frame


def run_frame(group: Group) -> pd.DataFrame:
    """The same as numbers, one row per run; the index as in :func:`score_table`.

    Columns: ``label``, ``method``, ``value`` (of :func:`main_metric`, as shown) with ``value_low``
    and ``value_high`` where an interval is known, ``density``, ``coverage``, ``prefill_seconds``,
    ``speed_up``, and ``difference``, ``low``, ``high`` and ``p_value`` against dense.
    """
    metric = main_metric(group)
    frame = pd.DataFrame([_numbers(row, metric) for row in group.rows])
    frame.index = pd.RangeIndex(1, len(frame) + 1, name="#")
    return frame


def main_metric(group: Group) -> Metric:
    """What ``value`` is in :func:`run_frame`: the metric that ranks the group's runs."""
    return next(iter(metrics_in(group.rows)), SCORE)


def paired_table(group: Group) -> pd.DataFrame | str:
    """Every sparse run against dense attention on the same samples, or what is missing for it."""
    frame = run_frame(group)
    frame = frame[frame["difference"].notna()]
    if frame.empty:
        return missing_dense(group)
    metric = main_metric(group)
    table = frame[["label", "difference", "low", "high", "p_value"]].copy()
    table["reading"] = [
        _reading(low, high, metric) for low, high in zip(frame.low, frame.high, strict=True)
    ]
    unit = f", {metric.difference_unit}" if metric.difference_unit else ""
    names = {"label": "method", "difference": f"difference{unit}", "p_value": "p"}
    decimals = 1 if metric.difference_unit == "points" else metric.decimals
    digits = dict.fromkeys(("difference", "low", "high"), decimals) | {"p_value": 4}
    return table.round(digits).rename(columns=names)


def missing_dense(group: Group) -> str:
    """A sentence: why there is nothing to pair, and the command that changes it."""
    metric = main_metric(group)
    if not metric.is_paired:
        return f"There is nothing to pair: {metric.name} is no score to compare with dense's."
    if group.dense is not None:
        return "Only dense attention has run here: run a sparse method on the same bench and model."
    commands = {row["dense_command"] for row in group.rows if row.get("dense_command")}
    return (
        f"No run of dense attention on the same samples. Make it with: `{sorted(commands)[0]}`"
        if commands
        else "These runs have no answers to pair."
    )


def winners(group: Group) -> pd.DataFrame | str:
    """Which sparse run is best in every cell of the bench, for needle a task at a length.

    Best is the best value of :func:`main_metric`, and of equal ones the lowest density. ``tied``
    counts the others with the same value, ``ahead`` is the lead over the next one, and ``samples``
    how many both rest on: a lead of few samples is no proof.
    """
    metric = main_metric(group)
    cells = pd.DataFrame(
        [
            {"label": run.label, "method": run.method, **_cell(cell, metric)}
            for run in group.runs
            for cell in run.metrics["results"]["cells"]
            if cell.get(metric.name) is not None
        ]
    )
    if cells.empty or (cells["method"] == DENSE).all():
        return "No sparse method with answers has run here."
    keys = [key for key in cells if key not in MEASURED]
    if not keys or cells.groupby(keys, dropna=False).ngroups < 2:
        return "This bench has one cell: the table above says which method is best."
    rows = []
    for names, cell in cells.groupby(keys, sort=False, dropna=False):
        sparse = cell[cell["method"] != DENSE].sort_values(
            ["value", "density"], ascending=[not metric.higher_is_better, True], kind="stable"
        )
        if sparse.empty:
            continue
        best = sparse.iloc[0]
        others = sparse.loc[sparse["value"] != best["value"], "value"]
        dense = cell.loc[cell["label"] == DENSE, "value"]  # the plain one
        rows.append(
            {
                **dict(zip(keys, names, strict=True)),
                "best": best["label"],
                "samples": best["samples"],
                "value": best["value"],
                "dense": dense.iloc[0] if len(dense) else None,
                "density": best["density"],
                "tied": int((sparse["value"] == best["value"]).sum()) - 1,
                "ahead": abs(best["value"] - others.iloc[0]) if len(others) else None,
            }
        )
    decimals = 1 if metric.difference_unit == "points" else metric.decimals
    digits = dict.fromkeys(("value", "dense", "ahead"), decimals) | {"density": 3}
    return pd.DataFrame(rows).round(digits).rename(columns={"value": metric.heading})


def wins(group: Group) -> pd.DataFrame | str:
    """How many cells each run wins, see :func:`winners`."""
    table = winners(group)
    if isinstance(table, str):
        return table
    counts = table["best"].value_counts()
    return pd.DataFrame({"cells won": counts, "of": len(table)}).rename_axis("method")


def layer_table(group: Group) -> pd.DataFrame | str:
    """Mean density and coverage per layer, a column pair per run; layers as the samples have them.

    Coverage is measured on some layers and samples only, see the bench's settings.
    """
    columns: dict[tuple[str, str], pd.Series] = {}
    for number, run in enumerate(group.runs, start=1):
        samples = run.samples()
        name = f"{number} {run.label}"
        density = [one["layer_density"] for one in samples if one.get("layer_density")]
        coverage = [one["layer_coverage"] for one in samples if one.get("layer_coverage")]
        if density:
            columns[name, "density"] = pd.DataFrame(density).mean()
        if coverage:
            frame = pd.DataFrame(coverage)
            frame.columns = frame.columns.astype(int)
            columns[name, "coverage"] = frame.mean()
    if not columns:
        return "These runs kept no numbers per layer."
    return pd.DataFrame(columns).rename_axis("layer").round(3)


def _numbers(row: Row, metric: Metric) -> dict[str, Any]:
    def shown(key: str, factor: float) -> float | None:
        return None if row.get(key) is None else factor * row[key]

    return {
        "label": row["label"],
        "method": row["method"],
        "value": shown(metric.name, metric.factor),
        "value_low": shown(f"{metric.name}_low", metric.factor),
        "value_high": shown(f"{metric.name}_high", metric.factor),
        **{key: row.get(key) for key in ("density", "coverage", "prefill_seconds", "speed_up")},
        **{key: shown(key, metric.difference_factor) for key in ("difference", "low", "high")},
        "p_value": row.get("p_value"),
        "timed_length": row.get("timed_length"),
    }


def _cell(cell: dict[str, Any], metric: Metric) -> dict[str, Any]:
    # What a cell is called: task, length, difficulty, category.
    names = {key: text for key, text in cell.items() if isinstance(text, str) or key == "length"}
    return {
        **names,
        "samples": cell.get("num_samples"),
        "value": metric.factor * cell[metric.name],
        "density": cell.get("density"),
    }


def _reading(low: float | None, high: float | None, metric: Metric) -> str:
    """What a 95 % interval of a difference says."""
    if low is None or high is None or pd.isna(low) or pd.isna(high):
        return "too little for an interval"
    if not metric.higher_is_better:
        low, high = -high, -low
    if high < 0:
        return "worse than dense"
    return "better than dense" if low > 0 else "no difference shown"

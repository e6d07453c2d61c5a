"""What records of ``bench=coverage`` say: curves, density at equal coverage, heads that gain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from experiments.store import Record

# A permutation helps or harms a head whose density at equal coverage moves by more than this.
TOLERANCE = 0.005
VERDICTS = ("helped", "unchanged", "harmed")


def points_of(records: Sequence[Record]) -> pd.DataFrame:
    """One row per prompt, layer, head and value of the knob.

    Returns:
        The columns ``prompt``, ``length``, ``layer``, ``head``, ``value`` (NaN where the knob does
        not apply), ``target`` (density that the value was chosen for, else NaN), ``is_own`` (the
        method's own setting), ``density`` and ``coverage``.
    """
    rows = [
        (record["prompt"], record["length"], record["layer"], head, point["value"],
         point.get("target"), point["is_own"], density, coverage)
        for record in records
        for point in record["points"]
        for head, density, coverage in zip(
            record["heads"], point["density"], point["coverage"], strict=True
        )
    ]  # fmt: skip
    columns = ["prompt", "length", "layer", "head", "value", "target", "is_own"]
    frame = pd.DataFrame(rows, columns=[*columns, "density", "coverage"])
    # In one order, whatever was measured first: sums of a resumed run are those of any other.
    frame = frame.sort_values(["length", "prompt", "layer"], kind="stable", ignore_index=True)
    return frame.astype({"value": float, "target": float})


def summarise_coverage(records: Sequence[Record]) -> dict[str, Any]:
    """Metrics of a run: every prompt, layer and head counts the same.

    Returns:
        ``density`` and ``coverage`` are those of the method's own setting; ``curve`` has them at
        every value of the knob, and ``cells`` one row per length, layer and value.
    """
    points = points_of(records)
    truncated = {record["prompt"] for record in records if record.get("is_truncated")}
    cells = [
        {
            "length": int(length),
            "layer": int(layer),
            "num_samples": int(part["prompt"].nunique()),
            "num_truncated": len(truncated.intersection(part["prompt"])),
            **point,
        }
        for (length, layer), part in points.groupby(["length", "layer"])
        for point in _curve_points(part)
    ]
    return {
        "total": {**_measure(points), **_basis(records)},
        "by_length": {str(length): _measure(part) for length, part in points.groupby("length")},
        "by_layer": {str(layer): _measure(part) for layer, part in points.groupby("layer")},
        "cells": cells,
    }


def mean_curve(points: pd.DataFrame) -> pd.DataFrame:
    """Mean density and coverage at each value, or each target, ascending in density.

    Args:
        points: as :func:`points_of` gives them.

    Returns:
        The columns ``is_own``, ``value``, ``target``, ``density`` and ``coverage``.
    """
    key = points["target"].fillna(points["value"]).rename("key")
    columns = ["value", "target", "density", "coverage"]
    means = points.groupby(["is_own", key], dropna=False)[columns].mean().reset_index()
    return means.drop(columns="key").sort_values(["density", "coverage"], ignore_index=True)


def density_at(curve: pd.DataFrame, coverage: float) -> float:
    """Smallest density at which a curve reaches a coverage, linear between its points.

    A curve that covers more than this already at its sparsest point has that point's density.

    Args:
        curve: the columns ``density`` and ``coverage``, ascending in density.
        coverage: in (0, 1].

    Raises:
        ValueError: the curve does not reach it.
    """
    reached = curve["coverage"].to_numpy()
    densities = curve["density"].to_numpy()
    enough = (reached >= coverage).nonzero()[0]
    if not len(enough):
        raise ValueError(
            f"coverage {coverage:g} is not reached: the densest point has {max(reached):.4f}; add "
            "denser values of the knob to bench.values, up to the one that computes everything"
        )
    last = enough[0]
    if last == 0:
        return float(densities[0])
    first = last - 1
    share = (coverage - reached[first]) / (reached[last] - reached[first])
    return float(densities[first] + share * (densities[last] - densities[first]))


def head_densities(points: pd.DataFrame, coverage: float) -> pd.Series:
    """Density that each head needs for a coverage, mean over prompts.

    Args:
        points: as :func:`points_of` gives them; points where the knob does not apply do not count.
        coverage: to reach, in (0, 1].

    Returns:
        Indexed by ``length``, ``layer`` and ``head``.

    Raises:
        ValueError: a head does not reach it.
    """
    usable = points.dropna(subset="value").sort_values(["density", "coverage"])
    needed = {
        key: density_at(curve, coverage)
        for key, curve in usable.groupby(["length", "layer", "head", "prompt"])
    }
    index = pd.MultiIndex.from_tuples(needed, names=["length", "layer", "head", "prompt"])
    series = pd.Series(list(needed.values()), index=index, name="density")
    return series.groupby(["length", "layer", "head"]).mean()


def compare_heads(
    before: pd.DataFrame, after: pd.DataFrame, *, coverage: float, tolerance: float = TOLERANCE
) -> pd.DataFrame:
    """Which heads need fewer tiles for the same coverage.

    Args:
        before: points without the permutation.
        after: points with it, of the same prompts, layers and heads.
        coverage: at which densities are compared.
        tolerance: largest change of the density that counts as none.

    Returns:
        One row per length, layer and head: ``before``, ``after``, ``change`` (densities; negative
        is fewer tiles) and ``verdict``, one of ``VERDICTS``.

    Raises:
        ValueError: the two have other prompts or heads, or a head does not reach the coverage.
    """
    keys = ["prompt", "layer", "head"]
    if set(before[keys].itertuples(index=False)) != set(after[keys].itertuples(index=False)):
        raise ValueError("expected the same prompts, layers and heads before and after")
    both = pd.DataFrame(
        {"before": head_densities(before, coverage), "after": head_densities(after, coverage)}
    ).reset_index()
    both["change"] = both["after"] - both["before"]
    both["verdict"] = "unchanged"
    both.loc[both["change"] < -tolerance, "verdict"] = "helped"
    both.loc[both["change"] > tolerance, "verdict"] = "harmed"
    return both


def _basis(records: Sequence[Record]) -> dict[str, Any]:
    """On what all of it was measured; a sample is a prompt and a layer."""
    rows = [record["num_rows"] for record in records if "num_rows" in record]
    return {
        "num_coverage_samples": len(records),
        "num_prompts": len({record["prompt"] for record in records}),
        "coverage_layers": sorted({record["layer"] for record in records}),
        "coverage_heads": sorted({head for record in records for head in record["heads"]}),
        "coverage_rows": max(rows, default=None),
        "num_truncated": sum(bool(record.get("is_truncated")) for record in records),
    }


def _measure(points: pd.DataFrame) -> dict[str, Any]:
    own = points[points["is_own"]]
    return {
        "num_samples": len(points.groupby(["prompt", "layer"])),
        "density": float(own["density"].mean()),
        "coverage": float(own["coverage"].mean()),
        "curve": _curve_points(points),
    }


def _curve_points(points: pd.DataFrame) -> list[dict[str, Any]]:
    """The mean curve as plain data; what does not apply is None."""
    return [
        {
            "is_own": bool(row.is_own),
            "knob_value": None if pd.isna(row.value) else float(row.value),
            "target": None if pd.isna(row.target) else float(row.target),
            "density": float(row.density),
            "coverage": float(row.coverage),
        }
        for row in mean_curve(points).itertuples()
    ]

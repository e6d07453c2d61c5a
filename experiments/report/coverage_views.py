"""What the bench ``coverage`` has measured: density needed for a coverage, curves over all runs."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pandas as pd

from experiments.benches.coverage.points import density_at, mean_curve, points_of
from experiments.report.run_pictures import draw_together
from experiments.report.runs import Group

COVERAGES = (0.8, 0.9, 0.95, 0.99)
NOT_REACHED = "–"


def needed_density(group: Group) -> pd.DataFrame | str:
    """Density at which each run's mean curve reaches a coverage, in per cent; less is better."""
    rows = []
    for run in group.runs:
        points = points_of(run.samples())
        for length, part in points.groupby("length"):
            curve = mean_curve(part)
            if len(curve) < 2:  # without a knob there is a point and no curve
                continue
            row = {"method": run.label, "tokens": str(length)}
            rows.append(row | {f"for {100 * c:g} %": _needed(curve, c) for c in COVERAGES})
    if not rows:
        return "No run here has a curve: give `bench.values` or `bench.num_values`."
    return pd.DataFrame(rows)


def _needed(curve: pd.DataFrame, coverage: float) -> str:
    if curve["coverage"].max() < coverage:
        return NOT_REACHED
    # The curve's sparsest point may cover more than that already.
    bound = "≤ " if curve["coverage"].iloc[0] > coverage else ""
    return f"{bound}{100 * density_at(curve, coverage):.1f}"


def drawn_together(group: Group) -> list[bytes]:
    """PNGs that the group's bench draws over all its runs; most benches draw none."""
    with tempfile.TemporaryDirectory() as folder:
        folders = [run.folder for run in group.runs]
        pictures = draw_together(group.bench, folders, Path(folder))
        return [path.read_bytes() for path in pictures]

"""Accuracy against density: which method keeps its answers with how little computed."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from experiments.report.pictures.looks import (
    DENSE_METHOD,
    LOOKS,
    Percent,
    look_of,
    new_figure,
    save,
)
from experiments.statistics import wilson_interval

# Where a label may stand around its point, in points, nearest first.
_PLACES = [
    (radius * np.cos(angle), radius * np.sin(angle))
    for radius in (12, 18, 24)  # no farther: a line to the point would cross curves
    for angle in np.deg2rad([0, 35, -35, 90, -90, 145, -145, 180])
]
# With more swept methods than this the settings stay out: there is no room, and the table has them.
_MOST_SWEPT = 4


class _Label(NamedTuple):
    """A text that belongs to a point."""

    x: float
    y: float
    text: str
    colour: str
    is_name: bool


def draw_accuracy_density(
    frame: pd.DataFrame, path: str | Path, *, title: str | None = None
) -> Path:
    """Accuracy against density, one point per run, with 95 % Wilson intervals.

    Runs of one method are joined, so that a swept parameter reads as a curve. Better is up and to
    the left.

    Args:
        frame: one row per run with the columns ``method``, ``density`` (above 0), ``accuracy``
            (in [0, 1]) and ``num_samples``. Optional columns: ``setting`` (text at the points of a
            method with several runs, what differs between them), and ``model``, ``bench`` and
            ``lengths``, whose values make up the title.
        path: where the PNG goes; missing folders are made.
        title: instead of the one made from the columns.

    Returns:
        Where the picture is.

    Raises:
        ValueError: no rows, a missing column, or values outside their ranges.
    """
    frame = _with_intervals(frame)
    figure = new_figure(8.0, 5.4)
    axes = figure.add_subplot()
    labels: list[_Label] = []
    num_swept = int((frame["method"].value_counts() > 1).sum())
    if num_swept > _MOST_SWEPT and "setting" in frame:
        frame = frame.drop(columns="setting")
    for method, runs in frame.groupby("method", sort=True):
        labels += _draw_runs(axes, str(method), runs.sort_values("density"))
    axes.set_xlim(0, max(1.0, float(frame["density"].max())) * 1.08)
    low, high = float(frame["low"].min()), float(frame["high"].max())
    margin = max(0.01, 0.12 * (high - low))
    axes.set_ylim(max(-0.03, low - margin), high + margin)
    axes.xaxis.set_major_formatter(Percent())
    axes.yaxis.set_major_formatter(Percent())
    # No tick above 100 %: there is no such accuracy.
    axes.set_yticks([tick for tick in axes.get_yticks() if low - margin <= tick <= 1.0 + 1e-9])
    axes.set_xlabel("density: computed tiles / tiles of dense causal attention", fontsize=11)
    axes.set_ylabel("accuracy (bands, bars: 95 % Wilson interval)", fontsize=11)
    axes.set_title(textwrap.fill(title or _title_of(frame), 84), fontsize=12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    _draw_legend(figure, list(frame["method"].unique()))
    # Labels come last: only now is it known where the points lie on the page.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    _place_labels(axes, labels, frame)
    return save(figure, path)


def _with_intervals(frame: pd.DataFrame) -> pd.DataFrame:
    """The checked runs, with the ends of their intervals in the columns ``low`` and ``high``."""
    needed = ("method", "density", "accuracy", "num_samples")
    missing = [name for name in needed if name not in frame.columns]
    if missing:
        raise ValueError(f"expected the columns {', '.join(needed)}; missing: {', '.join(missing)}")
    if frame.empty:
        raise ValueError("no runs to draw: the frame has no rows")
    frame = frame.reset_index(drop=True)
    for name, valid, expected in (
        ("density", (frame["density"] > 0) & np.isfinite(frame["density"]), "be above 0"),
        ("accuracy", frame["accuracy"].between(0, 1), "lie in [0, 1]"),
        ("num_samples", frame["num_samples"] >= 1, "be at least 1"),
    ):
        if not valid.all():
            row = int((~valid).idxmax())
            raise ValueError(f"{name} must {expected}, got {frame[name][row]} in row {row}")
    intervals = [
        wilson_interval(round(accuracy * total), int(total))
        for accuracy, total in zip(frame["accuracy"], frame["num_samples"], strict=True)
    ]
    return frame.assign(
        low=[interval.low for interval in intervals],
        high=[interval.high for interval in intervals],
    )


def _draw_runs(axes: Axes, method: str, runs: pd.DataFrame) -> list[_Label]:
    """Points, intervals and the joining line of one method; returns what to write at them."""
    look = look_of(method)
    x, y = runs["density"].to_numpy(float), runs["accuracy"].to_numpy(float)
    bars = np.stack([y - runs["low"], runs["high"] - y]).clip(min=0)
    is_dense = method == DENSE_METHOD
    has_band = len(x) > 1
    if has_band:
        axes.fill_between(x, y - bars[0], y + bars[1], color=look.colour, alpha=0.12, linewidth=0)
    axes.errorbar(
        x,
        y,
        yerr=None if has_band else bars,
        color=look.colour,
        marker=look.marker,
        # Large enough to show behind a method that computes everything, too.
        markersize=20 if is_dense else 9,
        markeredgecolor="white",
        linestyle="-" if len(x) > 1 else "none",
        linewidth=1.6,
        elinewidth=1.1,
        capsize=3,
        zorder=3,
    )
    if is_dense:
        axes.axhline(y.mean(), color=look.colour, linestyle="--", linewidth=1, alpha=0.5, zorder=1)
    # The name stands where the curve ends.
    labels = [_Label(x[-1], y[-1], look.label, look.colour, True)]
    if "setting" in runs and len(x) > 1:
        labels += [
            _Label(a, b, text, look.colour, False)
            for a, b, text in zip(x, y, runs["setting"], strict=True)
            if isinstance(text, str) and text
        ]
    return labels


def _draw_legend(figure: Figure, methods: Sequence[str]) -> None:
    """One entry per method, in the order of the table of looks."""
    known = [name for name in LOOKS if name in methods]
    handles = [
        Line2D(
            [],
            [],
            color=look_of(name).colour,
            marker=look_of(name).marker,
            markersize=12 if name == DENSE_METHOD else 8,
            markeredgecolor="white",
            linestyle="none",
            label=look_of(name).label,
        )
        for name in [*known, *sorted(set(methods) - set(known))]
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=10)


def _place_labels(axes: Axes, labels: Sequence[_Label], frame: pd.DataFrame) -> None:
    """Write each label at the nearest free place around its point.

    A label without any free place stays out: the legend still has the name.
    """
    renderer = axes.get_figure().canvas.get_renderer()
    taken = _obstacles(axes, frame)
    inside = axes.get_window_extent(renderer)
    for label in sorted(labels, key=lambda each: not each.is_name):
        for dx, dy in _PLACES:
            text = axes.annotate(
                label.text,
                (label.x, label.y),
                xytext=(dx, dy),
                textcoords="offset points",
                ha="left" if dx > 1 else "right" if dx < -1 else "center",
                va="center",
                fontsize=11 if label.is_name else 9,
                fontweight="bold" if label.is_name else "normal",
                color=label.colour,
                zorder=4,
            )
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer).padded(2)
            is_free = not any(box.overlaps(other) for other in taken)
            is_inside = inside.x0 < box.x0 and box.x1 < inside.x1
            if is_free and is_inside and inside.y0 < box.y0 and box.y1 < inside.y1:
                taken.append(box)
                break
            text.remove()


def _obstacles(axes: Axes, frame: pd.DataFrame) -> list[Bbox]:
    """Boxes on the page around the points, their bars, the joining lines and the dense line."""
    boxes = []
    counts = frame["method"].value_counts()
    for run in frame.itertuples():
        ends = [(run.density, value) for value in (run.low, run.accuracy, run.high)]
        (x, low), (_, y), (_, high) = axes.transData.transform(ends)
        boxes.append(Bbox.from_extents(x - 8, y - 8, x + 8, y + 8))
        if counts[run.method] == 1:  # several have a band, on which a name can be read
            boxes.append(Bbox.from_extents(x - 4, low, x + 4, high))
        if run.method == DENSE_METHOD:
            boxes.append(Bbox.from_extents(axes.bbox.x0, y - 1, axes.bbox.x1, y + 1))
    for _, runs in frame.groupby("method"):
        curve = axes.transData.transform(runs.sort_values("density")[["density", "accuracy"]])
        for start, end in pairwise(curve):
            steps = np.linspace(start, end, max(2, int(np.hypot(*(end - start)) / 4)))
            boxes += [Bbox.from_extents(x - 2, y - 2, x + 2, y + 2) for x, y in steps]
    return boxes


def _title_of(frame: pd.DataFrame) -> str:
    """Model, bench, lengths and samples, as far as the columns say."""
    parts = []
    for column, prefix in (("model", ""), ("bench", ""), ("lengths", "lengths ")):
        if column in frame:
            values = list(dict.fromkeys(str(value) for value in frame[column].dropna()))
            if values:
                parts.append(prefix + ", ".join(values))
    counts = sorted({int(count) for count in frame["num_samples"]})
    samples = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"Accuracy against density: {', '.join([*parts, f'{samples} samples a run'])}"

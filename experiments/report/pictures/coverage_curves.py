"""Coverage against density: which choice of tiles keeps the most attention."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from experiments.report.pictures.looks import Look, Percent, new_figure, save

# Shown of the coverage axis: below, nothing is worth comparing.
LOWEST_COVERAGE = 0.5
_LINE_STYLES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)))


@dataclass(frozen=True)
class Curve:
    """One run's trade of tiles for attention.

    Attributes:
        label: in the legend.
        look: colour and marker.
        points: as :func:`experiments.benches.coverage.points.mean_curve` gives them. The run's own
            setting is drawn large. Where the others were chosen for a density, or the knob does not
            apply to it, it stands beside the line.
        heads: the same curve of single heads, drawn thin.
    """

    label: str
    look: Look
    points: pd.DataFrame
    heads: tuple[pd.DataFrame, ...] = ()

    @property
    def line(self) -> pd.DataFrame:
        """The points that one knob turned step by step gives."""
        return line_of(self.points)


def line_of(points: pd.DataFrame) -> pd.DataFrame:
    """The points to join; all, unless the own setting is of another kind than the others."""
    is_apart = points["is_own"] & (points["value"].isna() | points["target"].notna().any())
    return points if is_apart.all() else points[~is_apart]


def draw_coverage_density(
    curves: Sequence[Curve],
    path: str | Path,
    *,
    title: str,
    note: str = "",
    reference: Curve | None = None,
) -> Path:
    """Coverage against density; better is up and to the left.

    Args:
        curves: at least one; later ones lie on top. Curves of equal colour get different dashes.
        path: where the PNG goes; missing folders are made.
        title: above the picture.
        note: over the legend.
        reference: one of the curves; a second panel then shows how many tiles the others save at
            equal coverage.

    Returns:
        Where the picture is.

    Raises:
        ValueError: no curves.
    """
    if not curves:
        raise ValueError("no curves to draw")
    others = [curve for curve in curves if curve is not reference and len(curve.line) > 1]
    has_savings = reference is not None and bool(others)
    width = 12.0 if has_savings else 8.0
    num_columns = _num_columns(width, [curve.label for curve in curves])
    num_rows = -(-len(curves) // num_columns)
    figure = new_figure(width, 5.6 + 0.22 * max(0, num_rows - 3))
    panels = figure.subplots(1, 2 if has_savings else 1, squeeze=False)[0]
    styles = _styles(curves)
    for curve, style in zip(curves, styles, strict=True):
        _draw_curve(panels[0], curve, style)
    lowest = min(float(curve.points["coverage"].min()) for curve in curves)
    panels[0].set_ylim(max(LOWEST_COVERAGE, lowest - 0.03), 1.012)
    panels[0].set_xlim(0, max(1.0, *(curve.points["density"].max() for curve in curves)) * 1.02)
    _label(panels[0], "density: computed tiles / tiles of dense causal attention", "coverage")
    panels[0].set_ylabel("coverage: attention on computed tiles", fontsize=11)
    if has_savings:
        _draw_savings(panels[1], reference, curves, styles)
    handles, labels = panels[0].get_legend_handles_labels()
    # Under the panels, so that no curve lies behind it.
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=num_columns,
        fontsize=10,
        title=textwrap.fill(note, 120 if has_savings else 85) or None,
        title_fontsize=10,
    )
    figure.suptitle(textwrap.fill(title, 105 if has_savings else 75), fontsize=12)
    return save(figure, path)


def _num_columns(width: float, labels: Sequence[str]) -> int:
    """Of the legend, so that the longest label fits; sizes in inches."""
    entry = 0.75 + 0.085 * max(len(label) for label in labels)
    return max(1, min(int(width / entry), int(width / 2.5), len(labels)))


def _draw_curve(axes: Axes, curve: Curve, style: object) -> None:
    for head in map(line_of, curve.heads):
        axes.plot(
            head["density"],
            head["coverage"],
            color=curve.look.colour,
            linewidth=0.7,
            alpha=0.3,
            zorder=2,
        )
    x, y = curve.line["density"].to_numpy(), curve.line["coverage"].to_numpy()
    axes.plot(
        x,
        y,
        color=curve.look.colour,
        marker=curve.look.marker,
        markersize=5 if len(x) > 1 else 10,
        markeredgecolor="white",
        markeredgewidth=0.6,
        linestyle=style if len(x) > 1 else "none",
        linewidth=1.8,
        label=curve.label,
        zorder=3,
    )
    own = curve.points[curve.points["is_own"]]
    axes.plot(
        own["density"],
        own["coverage"],
        color=curve.look.colour,
        marker=curve.look.marker,
        markersize=10,
        markeredgecolor="white",
        linestyle="none",
        zorder=3,
    )


def _draw_savings(
    axes: Axes, reference: Curve, curves: Sequence[Curve], styles: Sequence[object]
) -> None:
    """Density of the reference less that of each other curve, at equal coverage."""
    ends = [curve.line["coverage"] for curve in curves if len(curve.line) > 1]
    low = max(LOWEST_COVERAGE, *(float(values.min()) for values in ends))
    high = min(float(values.max()) for values in ends)
    coverages = np.linspace(low, high, 400)
    for curve, style in zip(curves, styles, strict=True):
        if len(curve.line) < 2:
            continue
        saved = _densities(reference, coverages) - _densities(curve, coverages)
        axes.plot(coverages, saved, color=curve.look.colour, linestyle=style, linewidth=1.8)
    # A tenth of a point is rounding; without this a picture of equal curves shows only that.
    bottom, top = axes.get_ylim()
    axes.set_ylim(min(bottom, -0.01), max(top, 0.01))
    _label(axes, "coverage", "density saved at equal coverage, points")
    axes.yaxis.set_major_formatter(Percent(symbol=""))
    axes.set_title(f"against: {reference.label}", fontsize=11)


def _densities(curve: Curve, coverages: np.ndarray) -> np.ndarray:
    points = curve.line.sort_values(["coverage", "density"])
    return np.interp(coverages, points["coverage"], points["density"])


def _styles(curves: Sequence[Curve]) -> list[object]:
    """A dash pattern for each curve: the first of a colour is solid."""
    seen: dict[str, int] = {}
    styles: list[object] = []
    for curve in curves:
        number = seen.get(curve.look.colour, 0)
        seen[curve.look.colour] = number + 1
        styles.append(_LINE_STYLES[number % len(_LINE_STYLES)])
    return styles


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=11)
    axes.set_ylabel(y, fontsize=11)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(Percent())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)

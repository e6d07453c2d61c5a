"""What a permutation does to every head: a map of layers and heads, and shares beside published."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.report.pictures.looks import Percent, new_figure, save

# Blue saves tiles, red costs some, white is no change: distinct to colour-blind eyes.
CHANGE_COLOURS = "RdBu_r"
VERDICT_COLOURS = {"helped": "#2166AC", "unchanged": "#BBBBBB", "harmed": "#B2182B"}
# Cells are labelled up to this many of them.
MAX_LABELLED = 128


def draw_head_changes(
    heads: pd.DataFrame,
    shares: Mapping[str, Mapping[str, float]],
    path: str | Path,
    *,
    title: str,
) -> Path:
    """Left how the density of every head changes, right how many are helped and harmed.

    Args:
        heads: the columns ``layer``, ``head`` and ``change`` (of the density at equal coverage;
            negative: fewer tiles), as :func:`experiments.benches.coverage.points.compare_heads`
            gives.
        shares: label of a bar to the shares of ``VERDICT_COLOURS``.
        path: where the PNG goes; missing folders are made.
        title: above the picture.

    Returns:
        Where the picture is.

    Raises:
        ValueError: no heads.
    """
    if heads.empty:
        raise ValueError("no heads to draw")
    figure = new_figure(12.5, 5.0)
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    largest = max(0.01, float(heads["change"].abs().max()))
    draw_head_map(
        figure,
        left,
        heads,
        "change",
        colours=CHANGE_COLOURS,
        limits=(-largest, largest),
        label="change of density at equal coverage (blue: less)",
    )
    _draw_shares(right, shares)
    figure.suptitle(textwrap.fill(title, 108), fontsize=12)
    return save(figure, path)


def draw_head_shares(heads: pd.DataFrame, path: str | Path, *, title: str) -> Path:
    """Density of every head on the left, its coverage on the right.

    Args:
        heads: the columns ``layer``, ``head``, ``density`` and ``coverage``; equal heads are
            averaged.
        path: where the PNG goes; missing folders are made.
        title: above the picture.

    Returns:
        Where the picture is.

    Raises:
        ValueError: no heads.
    """
    if heads.empty:
        raise ValueError("no heads to draw")
    figure = new_figure(12.5, 5.0)
    panels = figure.subplots(1, 2)
    for axes, column, label, colours in (
        (panels[0], "density", "density: computed tiles / causal tiles", "cividis"),
        (panels[1], "coverage", "coverage: attention on computed tiles", "viridis"),
    ):
        low, high = float(heads[column].min()), max(1.0, float(heads[column].max()))
        draw_head_map(figure, axes, heads, column, colours=colours, limits=(low, high), label=label)
    figure.suptitle(textwrap.fill(title, 108), fontsize=12)
    return save(figure, path)


def draw_head_map(
    figure: Figure,
    axes: Axes,
    heads: pd.DataFrame,
    column: str,
    *,
    colours: str,
    limits: tuple[float, float],
    label: str,
) -> None:
    """A cell for every layer and head, with its number where there are few.

    Args:
        figure: for the colour bar.
        axes: to draw on.
        heads: the columns ``layer``, ``head`` and ``column``; the mean of equal cells is drawn.
        column: a share, drawn in percent.
        colours: a colour map of matplotlib.
        limits: of the colours.
        label: of the colour bar.
    """
    table = heads.pivot_table(index="layer", columns="head", values=column)
    cells = table.to_numpy()
    image = axes.imshow(cells, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto")
    for axis, names in ((axes.xaxis, table.columns), (axes.yaxis, table.index)):
        axis.set_major_locator(MaxNLocator(16, integer=True, min_n_ticks=1))
        ticks = [tick for tick in axis.get_ticklocs() if 0 <= tick < len(names) and tick % 1 == 0]
        axis.set_ticks(ticks, [str(names[int(tick)]) for tick in ticks])
    axes.set_xlabel("query head", fontsize=11)
    axes.set_ylabel("layer", fontsize=11)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label(label, fontsize=10)
    bar.ax.yaxis.set_major_formatter(Percent())
    if cells.size > MAX_LABELLED:
        return
    is_signed = limits[0] < 0
    for (row, column_index), value in np.ndenumerate(cells):
        text = f"{100 * value:+.1f}" if is_signed else f"{100 * value:.1f}"
        red, green, blue, _ = image.cmap(image.norm(value))
        is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        axes.text(
            column_index,
            row,
            text,
            ha="center",
            va="center",
            fontsize=10,
            color="white" if is_dark else "black",
        )


def _draw_shares(axes: Axes, shares: Mapping[str, Mapping[str, float]]) -> None:
    """One bar for each, cut into helped, unchanged and harmed."""
    labels = list(shares)
    starts = np.zeros(len(labels))
    for verdict, colour in VERDICT_COLOURS.items():
        widths = np.array([shares[label][verdict] for label in labels])
        axes.barh(labels, widths, left=starts, color=colour, label=verdict, height=0.5)
        for row, (start, width) in enumerate(zip(starts, widths, strict=True)):
            # Beside a bar too narrow for its number there is white above it.
            is_narrow = 0 < width < 0.09
            axes.text(
                min(start + width / 2, 0.96),
                row + (0.33 if is_narrow else 0),
                f"{width:.1%}" if width else "",
                ha="center",
                va="center",
                fontsize=10,
                color="white" if verdict != "unchanged" and not is_narrow else "black",
            )
        starts += widths
    axes.invert_yaxis()
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(Percent())
    axes.set_xlabel("share of heads", fontsize=11)
    axes.tick_params(axis="y", labelsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=3, frameon=False)

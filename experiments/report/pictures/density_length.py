"""Density against prompt length, ours and published, and the coverage that ours buys."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from experiments.report.pictures.looks import Look, Percent, new_figure, save


@dataclass(frozen=True)
class Series:
    """One setting over lengths.

    Attributes:
        label: in the legend.
        look: colour and marker.
        ours: the columns ``length`` (tokens), ``density`` and ``coverage``.
        published: density by length; may be empty.
    """

    label: str
    look: Look
    ours: pd.DataFrame
    published: Mapping[int, float] = field(default_factory=dict)


def draw_density_length(
    series: Sequence[Series], path: str | Path, *, title: str, published: str = "published"
) -> Path:
    """Left density against length, published points hollow; right the coverage of ours.

    Equal settings do not cover equally much: read both panels together.

    Args:
        series: at least one, each with at least one length.
        path: where the PNG goes; missing folders are made.
        title: above the picture.
        published: what the hollow points are.

    Returns:
        Where the picture is.

    Raises:
        ValueError: nothing to draw.
    """
    if not series or any(each.ours.empty for each in series):
        raise ValueError("no densities to draw: expected at least one length in every series")
    figure = new_figure(12.0, 5.4)
    left, right = figure.subplots(1, 2)
    lengths = set()
    for each in series:
        ours = each.ours.sort_values("length")
        lengths |= {*ours["length"], *each.published}
        style = {"color": each.look.colour, "marker": each.look.marker, "markersize": 8}
        left.plot(ours["length"], ours["density"], label=each.label, **style)
        right.plot(ours["length"], ours["coverage"], **style)
        if each.published:
            left.plot(
                list(each.published),
                list(each.published.values()),
                label=f"{each.label}, {published}",
                markerfacecolor="white",
                linestyle=(0, (4, 2)),
                linewidth=1.2,
                **style,
            )
    left.set_ylim(0, 1.02)
    lowest = min(float(each.ours["coverage"].min()) for each in series)
    right.set_ylim(min(0.9, lowest - 0.02), 1.004)
    _label(left, "density: computed tiles / causal tiles", sorted(lengths))
    _label(
        right,
        "coverage (ours): attention probability on them",
        sorted({length for each in series for length in each.ours["length"]}),
    )
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(textwrap.fill(title, 105), fontsize=12)
    return save(figure, path)


def _label(axes: Axes, y: str, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_length(value)))
    axes.yaxis.set_major_formatter(Percent())
    axes.set_xlabel("prompt length, tokens", fontsize=11)
    axes.set_ylabel(y, fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def format_length(tokens: float) -> str:
    """Tokens in K where they are a multiple of 1024: "8K"."""
    whole = round(tokens)
    return f"{whole // 1024}K" if whole >= 1024 and whole % 1024 == 0 else f"{whole:,}"

"""Pictures over the runs of a group: trade-offs and differences. Colours belong to methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from experiments.report.pictures.looks import (
    DENSE_METHOD,
    LOOKS,
    Look,
    Percent,
    look_of,
    new_figure,
)
from experiments.report.runs import Group
from experiments.report.tables import main_metric, missing_dense, run_frame

DENSITY_LABEL = "density: computed tiles / tiles of dense causal attention"
COVERAGE_LABEL = "coverage: attention probability on computed tiles"
FRONT_COLOUR = "#888888"
# With more runs than this the intervals would hide each other; the table has them.
MOST_INTERVALS = 12


def draw_pareto(group: Group) -> Figure | str:
    """The main metric against density and against time; the grey line is the Pareto front.

    Numbers are those of the table's rows. Runs on the line are beaten by no other run in both
    quantities.
    """
    frame = run_frame(group)
    frame = frame[frame["value"].notna() & frame["density"].notna()]
    if frame.empty:
        return "No run here has both answers and a density."
    has_times = frame["prefill_seconds"].notna().any()
    figure = new_figure(11.0 if has_times else 6.5, 4.8)
    panels = figure.subplots(1, 2 if has_times else 1, sharey=True, squeeze=False)[0]
    metric = main_metric(group)
    is_up = metric.higher_is_better
    draw_trade_off(panels[0], frame, "density", "value", higher_is_better=is_up)
    panels[0].set_xlabel(DENSITY_LABEL)
    panels[0].set_ylabel(metric.heading)
    panels[0].xaxis.set_major_formatter(Percent())
    if has_times:
        timed = frame.assign(ms=1000 * frame["prefill_seconds"])[frame["prefill_seconds"].notna()]
        draw_trade_off(panels[1], timed, "ms", "value", higher_is_better=is_up)
        lengths = {int(length) for length in timed["timed_length"].dropna()}
        where = f" at {lengths.pop()} tokens" if len(lengths) == 1 else ""
        panels[1].set_xlabel(f"prefill{where}, ms (median)")
    towards = "up" if is_up else "down"
    figure.suptitle(f"{group.title}: what {metric.name} costs (better: {towards} and to the left)")
    add_legend(figure, frame["method"])
    return figure


def draw_coverage(group: Group) -> Figure | str:
    """Coverage against density: how much of dense attention's mass a run keeps, at what cost.

    The diagonal is what tiles drawn at random would keep of evenly spread attention.
    """
    frame = run_frame(group)
    frame = frame[frame["coverage"].notna() & frame["density"].notna()]
    if frame.empty:
        return "No run here measured coverage (needle: `bench.coverage_every`)."
    figure = new_figure(6.5, 5.0)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=FRONT_COLOUR, linestyle=":", linewidth=1, zorder=1)
    draw_trade_off(axes, frame, "density", "coverage")
    axes.set_xlim(0, 1.08 * max(1.0, float(frame["density"].max())))
    axes.set_ylim(max(-0.02, float(frame["coverage"].min()) - 0.08), 1.02)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(Percent())
    axes.set_xlabel(DENSITY_LABEL)
    axes.set_ylabel(COVERAGE_LABEL)
    axes.set_title(f"{group.title}: coverage against density")
    add_legend(figure, frame["method"])
    return figure


def draw_curves(curves: Mapping[str, tuple[Look, pd.DataFrame]], title: str) -> Figure:
    """Coverage against density over a method's settings; better is up and to the left.

    Args:
        curves: look and points (``density``, ``coverage``, ascending in density) by label.
        title: above the picture.
    """
    figure = new_figure(7.0, 4.8)
    axes = figure.add_subplot()
    for label, (look, points) in curves.items():
        axes.plot(
            points["density"],
            points["coverage"],
            color=look.colour,
            marker=look.marker,
            markersize=7,
            markeredgecolor="white",
            label=label,
        )
    axes.set_xlim(left=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(Percent())
    axes.set_xlabel(DENSITY_LABEL)
    axes.set_ylabel(COVERAGE_LABEL)
    axes.set_title(title)
    axes.legend(loc="lower right")
    tidy(axes)
    return figure


def draw_differences(group: Group) -> Figure | str:
    """Differences to dense attention on the same samples, with 95 % intervals, best on top."""
    frame = run_frame(group)
    frame = frame[frame["difference"].notna()].sort_values("difference", kind="stable")
    if frame.empty:
        return missing_dense(group)
    figure = new_figure(8.0, 1.4 + 0.36 * len(frame))
    axes = figure.add_subplot()
    for place, (number, row) in enumerate(frame.iterrows()):
        look = look_of(row["method"])
        errors = [[row["difference"] - row["low"]], [row["high"] - row["difference"]]]
        axes.errorbar(
            row["difference"],
            place,
            xerr=errors,
            color=look.colour,
            marker=look.marker,
            markersize=9,
            markeredgecolor="white",
            capsize=3,
            zorder=3,
        )
        frame.loc[number, "name"] = f"{row['label']}  ({number})"
    axes.axvline(0, color=look_of(DENSE_METHOD).colour, linestyle="--", linewidth=1, zorder=1)
    axes.set_yticks(range(len(frame)), frame["name"])
    for text, method in zip(axes.get_yticklabels(), frame["method"], strict=True):
        text.set_color(look_of(method).colour)
    axes.set_ylim(-0.6, len(frame) - 0.4)
    axes.set_xlabel("difference to dense attention, points (95 % interval, same samples)")
    axes.set_title(f"{group.title}: paired differences")
    tidy(axes, grid="x")
    return figure


def draw_trade_off(
    axes: Axes, frame: pd.DataFrame, x: str, y: str, *, higher_is_better: bool = True
) -> None:
    """Runs as points in the colours of their methods, numbered, with the Pareto front.

    Args:
        axes: where to draw.
        frame: one row per run with ``method`` and the two columns; the index numbers the runs. Less
            of ``x`` is better.
        x: column of the horizontal axis.
        y: column of the vertical axis; intervals are drawn from ``<y>_low`` to ``<y>_high``.
        higher_is_better: whether more of ``y`` is better.
    """
    sign = 1 if higher_is_better else -1
    points = pareto_front(frame.assign(**{y: sign * frame[y]}), x, y)
    points = points.assign(**{y: sign * points[y]})
    if len(points) > 1:
        # A step: between two runs nothing better than the cheaper one has been seen.
        axes.step(
            points[x],
            points[y],
            where="post",
            color=FRONT_COLOUR,
            linewidth=5,
            alpha=0.35,
            zorder=1,
        )
    has_intervals = f"{y}_low" in frame and len(frame) <= MOST_INTERVALS
    for method, runs in frame.groupby("method", sort=False):
        look = look_of(str(method))
        bars = None
        if has_intervals and runs[[f"{y}_low", f"{y}_high"]].notna().all(axis=None):
            ends = (runs[y] - runs[f"{y}_low"], runs[f"{y}_high"] - runs[y])
            bars = [end.clip(lower=0).to_numpy(float) for end in ends]
        axes.errorbar(
            runs[x],
            runs[y],
            yerr=bars,
            color=look.colour,
            marker=look.marker,
            markersize=17 if method == DENSE_METHOD else 9,
            markeredgecolor="white",
            # Unjoined: settings that differ in several ways make no curve.
            linestyle="none",
            elinewidth=0.9,
            capsize=2.5,
            zorder=3,
        )
    for number, run in frame.iterrows():
        axes.annotate(
            str(number),
            (run[x], run[y]),
            xytext=(8, 6),
            textcoords="offset points",
            fontsize=10,
            color=look_of(run["method"]).colour,
            # A number stays readable on a bar or a line.
            path_effects=[withStroke(linewidth=3, foreground="white")],
            zorder=5,
        )
    axes.set_xlim(0, 1.08 * float(frame[x].max()))
    tidy(axes)


def pareto_front(frame: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """The rows that no other row beats in one of the two without losing in the other, by ``x``."""
    best = float("-inf")
    kept = []
    # Of equally cheap runs the best comes first, and the others add nothing.
    for number, run in frame.sort_values([x, y], ascending=[True, False]).iterrows():
        if run[y] > best:
            best = run[y]
            kept.append(number)
    return frame.loc[kept]


def add_legend(figure: Figure, methods: Iterable[str]) -> None:
    """One entry per method below the picture, in the order of the table of looks."""
    handles = []
    for name in in_order(methods):
        look = look_of(name)
        handles.append(
            Line2D(
                [],
                [],
                color=look.colour,
                marker=look.marker,
                markersize=12 if name == DENSE_METHOD else 8,
                markeredgecolor="white",
                linestyle="none",
                label=look.label,
            )
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)))


def in_order(methods: Iterable[str]) -> Sequence[str]:
    """Each method once: those of the table of looks in its order, then the others by name."""
    names = set(methods)
    return [*(name for name in LOOKS if name in names), *sorted(names - set(LOOKS))]


def tidy(axes: Axes, *, grid: str = "both") -> None:
    """A light grid and no box."""
    axes.grid(alpha=0.25, axis=grid)
    axes.spines[["top", "right"]].set_visible(False)

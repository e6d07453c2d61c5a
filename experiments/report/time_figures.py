"""Pictures of times: where the milliseconds go, from which length a method pays, what is left."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullLocator

from experiments.report.figures import in_order, tidy
from experiments.report.pictures.looks import DENSE_METHOD, look_of, new_figure
from experiments.report.times import Times, times_frame
from experiments.timing.timing_report import STAGES, break_evens

# Paul Tol's "light" scheme; in this order neighbours differ in lightness, too.
STAGE_COLOURS = {
    "order": "#EE8866",
    "selection": "#EEDD88",
    "gather": "#44BB99",
    "attention": "#77AADD",
    "rest": "#DDDDDD",
}
# Several variants of a method share its colour and differ in their lines.
# Dense kernels besides that of the method "flash".
OTHER_DENSE = "#777777"
LINES = ("-", "--", ":", "-.")
# What is left of a call when its stages are taken away is worth showing from this share on.
LEAST_REST = 0.05


def draw_breakdown(times: Times) -> Figure | str:
    """Time of each stage as a share of the fastest dense kernel's time at the same length.

    A bar that ends left of the line is faster than dense attention. Stages are medians of calls of
    their own; the diamond is the median of whole calls.
    """
    frame = _sparse(times)
    frame = frame[frame["attention_ms"].notna() & frame["speed_up_over_fastest"].notna()]
    if frame.empty:
        return "No run here has the times of its stages beside a dense kernel."
    lengths = sorted(frame["length"].unique())
    num_columns = min(3, len(lengths))
    num_rows = -(-len(lengths) // num_columns)
    variants = _variants(frame)
    height = num_rows * (0.7 + 0.3 * len(variants)) + 1.2
    figure = new_figure(max(7.5, 3.6 * num_columns + 1.6), height)
    panels = figure.subplots(num_rows, num_columns, squeeze=False, sharey=True)
    for axes, length in zip(panels.flat, lengths, strict=False):
        cells = frame[frame["length"] == length].drop_duplicates("variant", keep="last")
        _draw_bars(axes, cells.set_index("variant"), variants)
        axes.set_title(f"{length} tokens", fontsize=11)
    for axes in panels.flat[len(lengths) :]:
        axes.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_yticks(range(len(variants)), variants)
        for text in axes.get_yticklabels():
            text.set_color(look_of(text.get_text().partition(" ")[0]).colour)
        axes.set_ylim(len(variants) - 0.4, -0.6)
    heading = f"{times.title}: where the time goes, {times.device}"
    unit = "1 is the time of the fastest dense kernel (dashed), a diamond the whole call"
    figure.suptitle(f"{heading}\n{unit}", fontsize=11)
    shown = [name for name in (*STAGES, "rest") if name != "rest" or _has_rest(frame)]
    handles = [Patch(color=STAGE_COLOURS[name], label=name) for name in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def draw_speed_up(times: Times) -> Figure | str:
    """Speed-up over the fastest dense kernel against length; rings mark break-even lengths.

    Bars reach from the 20th to the 80th percentile of the ratios round by round.
    """
    frame = _sparse(times)
    frame = frame[frame["speed_up_over_fastest"].notna()]
    if frame["length"].nunique() < 2:
        return "Two lengths or more make this picture: `bench.lengths=[4096,8192,16384]`."
    figure, axes = _length_figure(times, "speed-up over the fastest dense kernel")
    axes.axhline(1, color=look_of(DENSE_METHOD).colour, linewidth=1, linestyle="--", zorder=1)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    _draw_lines(axes, frame, "speed_up_over_fastest")
    for point in break_evens(times.records):
        is_crossing = point["break_even"] and point["break_even"] > point["shortest"]
        if point["dense"] == "fastest" and is_crossing:
            colour = look_of(point["method"].partition(" ")[0]).colour
            axes.plot(
                point["break_even"],
                1,
                marker="o",
                markersize=14,
                markerfacecolor="none",
                markeredgecolor=colour,
                markeredgewidth=1.5,
                zorder=4,
            )
    counts = frame["num_samples"]
    heading = (
        f"{times.title}: speed-up over dense, {counts.min():.0f} to {counts.max():.0f} samples"
    )
    figure.suptitle(f"{heading}\n{times.device}", fontsize=12)
    return figure


def draw_floor(times: Times) -> Figure | str:
    """Measured time over the floor, the time below which no version of the method gets."""
    frame = times_frame(times)
    frame = frame[frame["floor_ms"].notna() & frame["median_ms"].notna()]
    if frame.empty:
        return "No floor is known here: the device's rates have not been measured."
    frame = frame.assign(over_floor=frame["median_ms"] / frame["floor_ms"])
    figure, axes = _length_figure(times, "measured time / floor")
    _draw_lines(axes, frame, "over_floor")
    axes.axhline(1, color="#888888", linewidth=1, linestyle=":", zorder=1)
    axes.set_ylim(bottom=0)
    figure.suptitle(f"{times.title}: how far above the floor\n{times.device}", fontsize=12)
    return figure


def _sparse(times: Times) -> pd.DataFrame:
    """Rows of methods that ran sparse and have a time."""
    frame = times_frame(times)
    is_sparse = (frame["kind"] == "method") & frame["median_ms"].notna()
    if "dense_reason" in frame:
        is_sparse &= frame["dense_reason"].fillna("") == ""
    return frame[is_sparse]


def _variants(frame: pd.DataFrame) -> list[str]:
    """Labels, by the order of their methods."""
    return [
        label
        for method in in_order(frame["method"])
        for label in dict.fromkeys(frame.loc[frame["method"] == method, "variant"])
    ]


def _has_rest(frame: pd.DataFrame) -> bool:
    return bool((_rest(frame) > LEAST_REST * frame["median_ms"]).any())


def _rest(frame: pd.DataFrame) -> pd.Series:
    """What is not attention: of a whole model most of the time."""
    stages = frame[[f"{name}_ms" for name in STAGES]].fillna(0).sum(axis=1)
    return (frame["median_ms"] - stages).clip(lower=0)


def _draw_bars(axes: Axes, cells: pd.DataFrame, variants: list[str]) -> None:
    """A stacked bar per variant, in units of the dense time."""
    rest = _rest(cells)
    for place, variant in enumerate(variants):
        if variant not in cells.index:
            continue
        cell = cells.loc[variant]
        dense_ms = cell["median_ms"] * cell["speed_up_over_fastest"]
        start = 0.0
        parts = {name: cell[f"{name}_ms"] for name in STAGES}
        if rest[variant] > LEAST_REST * cell["median_ms"]:
            parts["rest"] = rest[variant]
        for name, value in parts.items():
            width = 0.0 if pd.isna(value) else value / dense_ms
            axes.barh(place, width, left=start, color=STAGE_COLOURS[name], height=0.7, zorder=2)
            start += width
        axes.plot(cell["median_ms"] / dense_ms, place, "D", color="#222222", ms=5, zorder=4)
    axes.axvline(1, color=look_of(DENSE_METHOD).colour, linewidth=1.2, linestyle="--", zorder=3)
    axes.set_xlim(left=0)
    tidy(axes, grid="x")


def _length_figure(times: Times, label: str) -> tuple[Figure, Axes]:
    figure = new_figure(9.0, 5.0)
    axes = figure.add_subplot()
    lengths = sorted({record["length"] for record in times.records})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_length(value)))
    axes.set_xlabel("tokens")
    axes.set_ylabel(label)
    tidy(axes)
    return figure, axes


def _draw_lines(axes: Axes, frame: pd.DataFrame, column: str) -> None:
    """A line per variant and, where there are several, per head shape and density."""
    keys = ["variant"]
    # Densities that differ from length to length make one line.
    by_length = frame.groupby("length")["target_density"].nunique()
    if "target_density" in frame and (by_length > 1).any():
        keys.append("target_density")
    if frame["shape"].nunique() > 1:
        keys.append("shape")
    drawn: dict[str, int] = {}
    order = {label: index for index, label in enumerate(_variants(frame))}
    groups = sorted(frame.groupby(keys), key=lambda item: order[item[0][0]])
    for names, cells in groups:
        method = cells["method"].iloc[0]
        is_dense = cells["kind"].iloc[0] == "dense"
        look = look_of(method)
        if is_dense and method != DENSE_METHOD:
            look = look._replace(colour=OTHER_DENSE)
        line = LINES[drawn.get(method, 0) % len(LINES)]
        drawn[method] = drawn.get(method, 0) + 1
        means = cells.groupby("length")[column].median()
        label = ", ".join(str(name) for name in names)
        axes.plot(
            means.index,
            means,
            color=look.colour,
            marker=look.marker,
            markersize=14 if method == DENSE_METHOD else 8,
            markeredgecolor="white",
            linestyle=line,
            linewidth=1.5,
            label=f"dense {label}" if is_dense else label,
            zorder=3,
        )
        if f"{column}_p20" in cells:
            ends = cells.groupby("length")[[f"{column}_p20", f"{column}_p80"]].median()
            axes.vlines(ends.index, *ends.to_numpy().T, color=look.colour, linewidth=1, zorder=2)
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=4)


def short_length(length: float) -> str:
    """8192 as "8K"; lengths that are no multiple of 1024 as they are."""
    whole = round(length)
    return f"{whole // 1024}K" if whole >= 1024 and whole % 1024 == 0 else str(whole)

"""KL to dense against density and time, over the runs of ``bench=likelihood`` of a group."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.report.pictures.looks import LOOKS, Percent, look_of, new_figure, save
from experiments.store import RunStore

# Below this a KL is rounding, and a logarithmic axis has no place for it.
ROUNDING = 1e-5


def likelihood_frame(folders: Sequence[Path]) -> pd.DataFrame:
    """A row for each run, length and band, as ``results["cells"]`` has it, with the method."""
    rows = []
    for folder in folders:
        metrics = RunStore(folder).metrics()
        if metrics.get("status") == "finished":
            facts = {"method": metrics["method"], "label": metrics["label"]}
            facts |= {"model": metrics["model"]}
            rows += [{**facts, **cell} for cell in metrics["results"]["cells"]]
    return pd.DataFrame(rows)


def draw_likelihood(folders: Sequence[Path], folder: Path) -> list[Path]:
    """One picture a length, ``kl_<length>.png``: panels for all positions, time, each band.

    Bands, against time bars, are 95 % intervals of the mean over windows (Student). Better is down
    and to the left. Runs of one method are joined in the order of their density. What is dense, up
    to rounding, has no place on the axis.

    Returns:
        The pictures; none if no run left anything out.
    """
    return [
        save(figure, folder / f"kl_{length}.png") for length, figure in likelihood_figures(folders)
    ]


def likelihood_figures(folders: Sequence[Path]) -> list[tuple[int, Figure]]:
    """The figures of :func:`draw_likelihood` with their lengths, ascending."""
    frame = likelihood_frame(folders)
    if frame.empty or not (frame["kl"] > ROUNDING).any():
        return []
    return [
        (int(length), _draw(part, int(length)))
        for length, part in frame.groupby("length", sort=True)
        if (part["kl"] > ROUNDING).any()
    ]


def _draw(frame: pd.DataFrame, length: int) -> Figure:
    bands = [band for band in frame["band"].unique() if band != "all"]
    figure = new_figure(13.0, 8.0)
    panels = figure.subplots(2, 3, sharey=True).flatten()
    whole = frame[frame["band"] == "all"]
    _panel(panels[0], whole, "density", "all positions")
    _panel(panels[1], whole, "prefill_seconds", "all positions, against time")
    for axes, band in zip(panels[2:], bands, strict=False):
        _panel(axes, frame[frame["band"] == band], "density", f"positions, quarter {band}")
    sparse = frame[frame["kl"] > ROUNDING]
    for axes in panels:
        axes.set_yscale("log")
        axes.set_ylim(0.5 * sparse["kl"].min(), 2.0 * sparse["kl"].max())
        axes.grid(alpha=0.25, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (panels[0], panels[3]):
        axes.set_ylabel("KL(dense || sparse), nats")
    counts = sorted({int(count) for count in whole["num_samples"]})
    windows = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    figure.suptitle(
        f"What is lost on real text: {frame['model'].iloc[0]}, {length} tokens, {windows} windows "
        "a run (bands and bars: 95 % interval over windows)"
    )
    names = [*(name for name in LOOKS if name in set(sparse["method"]))]
    names += sorted(set(sparse["method"]) - set(names))
    handles = [
        Line2D([], [], color=look_of(name).colour, marker=look_of(name).marker, markersize=8,
               markeredgecolor="white", label=look_of(name).label)
        for name in names
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=6)
    return figure


def _panel(axes: Axes, frame: pd.DataFrame, column: str, title: str) -> None:
    axes.set_title(title, fontsize=11)
    if column == "density":
        axes.set_xlim(0, min(1.02, 1.15 * frame.loc[frame["kl"] > ROUNDING, "density"].max()))
        axes.xaxis.set_major_formatter(Percent())
        axes.set_xlabel("density")
    else:
        axes.set_xlabel("prefill without the head, seconds")
        dense = frame[frame["kl"] <= ROUNDING]
        if len(dense) and column in dense:
            axes.axvline(dense[column].min(), color="black", linestyle="--", linewidth=1)
            axes.annotate("dense", (dense[column].min(), 0.97), xycoords=("data", "axes fraction"),
                          rotation=90, ha="right", va="top", fontsize=9)  # fmt: skip
    if column not in frame:
        return
    shown = frame[(frame["kl"] > ROUNDING) & frame[column].notna()]
    for method, runs in shown.groupby("method"):
        runs = runs.sort_values("density")
        look = look_of(str(method))
        x, y = runs[column].to_numpy(float), runs["kl"].to_numpy(float)
        low = high = y
        if "kl_low" in runs:
            low = np.clip(runs["kl_low"].fillna(runs["kl"]).to_numpy(float), ROUNDING, y)
            high = np.maximum(runs["kl_high"].fillna(runs["kl"]).to_numpy(float), y)
        has_band = column == "density" and len(runs) > 1
        if has_band:
            axes.fill_between(x, low, high, color=look.colour, alpha=0.15, linewidth=0)
        axes.errorbar(
            x, y, yerr=None if has_band else np.stack([y - low, high - y]), color=look.colour,
            marker=look.marker, markersize=7, markeredgecolor="white", linewidth=1.4,
            elinewidth=0.9, capsize=2,
        )  # fmt: skip

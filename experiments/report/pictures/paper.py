"""Figures of the PBS paper, drawn from runs of ``bench=coverage``, published points beside them.

A command with ``figure=NAME``, as in ``experiment=figure1``, ends with that figure over its cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.benches.coverage.points import compare_heads, mean_curve, points_of
from experiments.files import write_atomically
from experiments.report.compare import config_of
from experiments.report.pictures.coverage_curves import Curve, draw_coverage_density
from experiments.report.pictures.density_length import Series, draw_density_length
from experiments.report.pictures.head_changes import draw_head_changes, draw_head_shares
from experiments.report.pictures.looks import look_of_order, look_of_settings
from experiments.report.published_scores import load_published
from experiments.settings.config import FIGURES, RunConfig
from experiments.settings.names import describe
from experiments.store import RunStore
from experiments.timing.published import DENSITIES, DENSITIES_UNPERMUTED, HEADS, HEADS_COVERAGE

PAPER = "paper: Llama-3.1-8B"


@dataclass(frozen=True)
class CoverageRun:
    """A finished run of the bench: its configuration and its points."""

    cfg: RunConfig
    points: pd.DataFrame

    def at(self, length: int) -> CoverageRun:
        """The part at one length."""
        return CoverageRun(self.cfg, self.points[self.points["length"] == length])

    def curve(self, label: str | None = None) -> Curve:
        """Mean over prompts, layers and heads."""
        look = look_of_settings(self.cfg.method)
        return Curve(label or describe(self.cfg.method), look, mean_curve(self.points))


def load_runs(folders: Sequence[Path]) -> list[CoverageRun]:
    """The finished runs of the bench among these folders."""
    runs = []
    for folder in folders:
        store = RunStore(folder)
        if store.metrics().get("status") != "finished":
            continue
        cfg = config_of(folder)
        if cfg.bench["name"] == "coverage":
            runs.append(CoverageRun(cfg, points_of(store.samples())))
    return runs


def draw_figure(name: str, folders: Sequence[Path], folder: Path) -> list[Path]:
    """Draw one of ``FIGURES`` from finished runs.

    Args:
        name: which.
        folders: of the runs: one model, one set of prompts.
        folder: where the picture (``<name>.png``) and its table go.

    Returns:
        The pictures.

    Raises:
        ValueError: the runs lack one that the figure needs.
    """
    return _FIGURES[name](load_runs(folders), folder)


def draw_curves(folders: Sequence[Path], folder: Path) -> list[Path]:
    """Coverage against density of all these runs at their longest length."""
    runs = load_runs(folders)
    if not runs:
        return []
    runs, title = _longest(runs)
    path = folder / "coverage_density.png"
    curves = [run.curve() for run in runs]
    return [draw_coverage_density(curves, path, title=f"Coverage against density: {title}")]


def draw_run(folder: Path) -> list[Path]:
    """Pictures of one run: its curve over those of its heads, and the map of its heads.

    ``heads.csv`` has every number: a row per prompt, layer, head and value of the knob.
    """
    store = RunStore(folder)
    run = CoverageRun(config_of(folder), points_of(store.samples()))
    write_atomically(folder / "heads.csv", run.points.to_csv(index=False))
    (longest,), title = _longest([run])
    points = longest.points
    heads = tuple(mean_curve(part) for _, part in points.groupby(["layer", "head"]))
    curve = replace(longest.curve(), heads=heads)
    title = f"{describe(run.cfg.method)}: {title}"
    note = "thin: single heads; large: the run's own setting"
    path = folder / "coverage_density.png"
    return [
        draw_coverage_density([curve], path, title=title, note=note),
        draw_head_shares(points[points["is_own"]], folder / "heads.png", title=title),
    ]


def _figure1(runs: Sequence[CoverageRun], folder: Path) -> list[Path]:
    runs, title = _longest(runs)
    curves = {_order(run): run.curve(look_of_order(_order(run)).label) for run in runs}
    return [
        draw_coverage_density(
            # The paper's own order lies on top of the others.
            sorted(curves.values(), key=lambda curve: curve is curves.get("last_block")),
            folder / "figure1.png",
            title=f"Key orders. {title}",
            reference=curves.get("none"),
        )
    ]


def _figure13(runs: Sequence[CoverageRun], folder: Path) -> list[Path]:
    runs, title = _longest(runs)
    labels = {
        "per_query_head": "one order per query head",
        "shared": "one order per key/value head",
    }
    found = {run.cfg.method.get("gqa"): run for run in runs}
    _need("figure13", [kind in found for kind in labels], "method.gqa of both kinds")
    curves = {kind: found[kind].curve(label) for kind, label in labels.items()}
    scores = [_published_longbench(parameters) for parameters in ({}, {"gqa": "shared"})]
    note = (
        f"published: LongBench average of Llama-3.1-8B {scores[0]:.2f} with one order per query "
        f"head, {scores[1]:.2f} with one per key/value head"
    )
    return [
        draw_coverage_density(
            list(curves.values()),
            folder / "figure13.png",
            title=f"Orders under grouped queries. {title}",
            note=note,
            reference=curves["per_query_head"],
        )
    ]


def _figure5(runs: Sequence[CoverageRun], folder: Path) -> list[Path]:
    before, after = _before_and_after("figure5", runs)
    thresholds = {run.cfg.method["threshold"] for run in (before, after)}
    _need("figure5", [len(thresholds) == 1], "equal thresholds")
    published = {"none": DENSITIES_UNPERMUTED, "last_block": DENSITIES}
    series = []
    for run in (before, after):
        own = run.points[run.points["is_own"]].groupby("length")[["density", "coverage"]].mean()
        look = look_of_order(_order(run))
        series.append(Series(look.label, look, own.reset_index(), published[_order(run)]))
    return [
        draw_density_length(
            series,
            folder / "figure5.png",
            title=f"Density at τ = {thresholds.pop():g}: {_where([before, after])}",
            published=f"{PAPER} at τ = 0.9",
        )
    ]


def _table6(runs: Sequence[CoverageRun], folder: Path) -> list[Path]:
    runs, title = _longest(runs)
    before, after = _before_and_after("table6", runs)
    heads = compare_heads(before.points, after.points, coverage=HEADS_COVERAGE)
    ours = {verdict: float((heads["verdict"] == verdict).mean()) for verdict in HEADS}
    name = after.cfg.model_name
    write_atomically(folder / "table6.csv", heads.to_csv(index=False))
    write_atomically(folder / "table6.md", _table6_text(name, ours, heads))
    return [
        draw_head_changes(
            heads,
            {name: ours, f"{PAPER}, 32K": HEADS},
            folder / "table6.png",
            title=f"Heads at {HEADS_COVERAGE:.1%} coverage. {title}",
        )
    ]


def _table6_text(name: str, ours: dict[str, float], heads: pd.DataFrame) -> str:
    """The table as the paper prints it, ours beside it."""
    lines = ["| | " + " | ".join(HEADS) + " |", "| --- " * (len(HEADS) + 1) + "|"]
    for label, shares in ((name, ours), (f"{PAPER}, 32K", HEADS)):
        lines.append(f"| {label} | " + " | ".join(f"{shares[v]:.1%}" for v in HEADS) + " |")
    mean = heads[["before", "after"]].mean()
    lines += [
        "",
        f"{len(heads)} heads at {HEADS_COVERAGE:.1%} coverage; mean density {mean['before']:.1%} "
        f"without and {mean['after']:.1%} with the permutation.",
    ]
    return "\n".join(lines) + "\n"


_FIGURES: dict[str, Callable[[Sequence[CoverageRun], Path], list[Path]]] = {
    "figure1": _figure1,
    "figure5": _figure5,
    "figure13": _figure13,
    "table6": _table6,
}
assert set(_FIGURES) == set(FIGURES)


def _before_and_after(name: str, runs: Sequence[CoverageRun]) -> tuple[CoverageRun, CoverageRun]:
    """The runs without and with the permutation."""
    found = {_order(run): run for run in runs}
    wanted = ("none", "last_block")
    _need(name, [order in found for order in wanted], f"method.order={' and '.join(wanted)}")
    return found["none"], found["last_block"]


def _published_longbench(parameters: dict[str, str]) -> float:
    """The paper's LongBench average of PBS with these parameters on Llama-3.1-8B."""
    return next(
        score.value
        for score in load_published("longbench", "llama31_8b")
        if (score.method, score.quantity, score.harness) == ("pbs", "average", "opencompass")
        and score.parameters == parameters
    )


def _need(name: str, conditions: Sequence[bool], what: str) -> None:
    if not all(conditions):
        raise ValueError(f"{name} needs finished runs of bench=coverage with {what}")


def _order(run: CoverageRun) -> Any:
    return run.cfg.method.get("order", "none")


def _longest(runs: Sequence[CoverageRun]) -> tuple[list[CoverageRun], str]:
    """The runs at the longest length they all have, and words for it."""
    if not runs:
        raise ValueError("no finished run of bench=coverage to draw")
    lengths = set.intersection(*(set(run.points["length"]) for run in runs))
    if not lengths:
        raise ValueError("the runs have no length in common")
    longest = max(lengths)
    return [run.at(longest) for run in runs], f"{_where(runs)}, {longest:,} tokens"


def _where(runs: Sequence[CoverageRun]) -> str:
    """Model, text, and over how much the mean goes."""
    cfg, points = runs[0].cfg, runs[0].points
    longest = points[points["length"] == points["length"].max()]
    text = Path(cfg.bench["text"]).stem
    num_heads = len(longest.groupby(["layer", "head"]))
    num_prompts = longest["prompt"].nunique()
    prompts = "1 prompt" if num_prompts == 1 else f"{num_prompts} prompts"
    return f"{cfg.model_name}, {text}, {prompts}, {num_heads} heads"

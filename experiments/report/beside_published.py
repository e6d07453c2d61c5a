"""Ours beside the published numbers, and what is published and has not been measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from experiments.report.published_scores import FOLDER, compare_published, load_published
from experiments.report.runs import Results
from experiments.report.times import Times, all_times, committed_times, interval_text, times_frame
from experiments.timing.published import TABLE7, PublishedRow, density_at
from experiments.timing.timing_report import marks_of

# Heads of the paper's Table 7, and its dense kernel.
TABLE7_SHAPE = "32/8/128"
TABLE7_DENSE = "flash"
# Times at another density say nothing about the published ones.
DENSITY_TOLERANCE = 0.01


@dataclass(frozen=True)
class PublishedSet:
    """Published scores of one bench and model without a run of ours.

    Attributes:
        bench: of this project.
        model: of this project.
        sources: papers and tables.
        methods: with a published score.
    """

    bench: str
    model: str
    sources: tuple[str, ...]
    methods: tuple[str, ...]


def compared_scores(results: Results) -> list[tuple[str, pd.DataFrame]]:
    """Heading and table for every bench and model that has runs and published scores.

    Differences are ours minus published, in points; a status says how far the two may be compared.
    """
    found = []
    for bench, model in sorted({(group.bench, group.model) for group in results.groups}):
        if not load_published(bench, model):
            continue
        frame = compare_published(results.path / bench / model)
        for source, part in frame.groupby("source", sort=False):
            table = pd.DataFrame(
                {
                    "method": part["method"],
                    "quantity": part["quantity"],
                    "ours": _format(part["ours"], "{:.2f}"),
                    "published": _format(part["published"], "{:.2f}"),
                    "difference": _format(part["difference"], "{:+.2f}"),
                    "status": [
                        f"{status}; {note}" if note else status
                        for status, note in zip(part["status"], part["note"], strict=True)
                    ],
                }
            )
            found.append((f"{bench} on {model}: {source} ({part['unit'].iloc[0]})", table))
    return found


def unmeasured(results: Results) -> list[PublishedSet]:
    """Published scores of benches and models that have not been run at all."""
    measured = {(group.bench, group.model) for group in results.groups}
    missing = []
    for bench in sorted(path.stem for path in FOLDER.glob("*.yaml")):
        scores = load_published(bench)
        for model in dict.fromkeys(score.model for score in scores):
            if (bench, model) not in measured:
                own = [score for score in scores if score.model == model]
                sources = tuple(dict.fromkeys(score.source for score in own))
                methods = tuple(dict.fromkeys(score.method for score in own))
                missing.append(PublishedSet(bench, model, sources, methods))
    return missing


def compared_times(results: Results) -> pd.DataFrame | str:
    """Attention alone at the lengths and heads of the paper's Table 7, beside its numbers.

    Times that come with the project and those of ``outputs``, at the paper's densities. Speed-ups
    are over PyTorch's FlashAttention-2, as in the paper.
    """
    published = {row.length: row for row in TABLE7}
    rows = [
        row
        for times in [*committed_times(), *all_times(results)]
        for row in _beside(times, published)
    ]
    if not rows:
        return (
            "No times at the heads and densities of the paper's Table 7; a GPU gives them in "
            "minutes: `make bench-gpu`, or `python run.py experiment=table7`."
        )
    return pd.DataFrame(rows)


def _beside(times: Times, published: dict[int, PublishedRow]) -> Iterator[dict[str, object]]:
    frame = times_frame(times)
    if "dtype" not in frame:
        return
    is_own = (frame["shape"] == TABLE7_SHAPE) & frame["length"].isin(list(published))
    is_own &= frame["dtype"] == "bfloat16"
    for _, cell in frame[is_own].groupby("cell"):
        dense = cell[(cell["kind"] == "dense") & (cell["variant"] == TABLE7_DENSE)]
        ours = cell[(cell["method"] == "pbs") & cell["median_ms"].notna()]
        for row in ours.itertuples():
            paper = published[int(row.length)]
            if abs(row.density - density_at(paper.length)[0]) > DENSITY_TOLERANCE:
                continue
            dense_ms = None if dense.empty else float(dense["median_ms"].iloc[0])
            yield {
                "source": f"{times.title}, {times.device}",
                "tokens": int(row.length),
                "variant": row.variant,
                "density": f"{row.density:.3f}",
                "FA2, ms": "" if dense_ms is None else f"{dense_ms:.2f}",
                "ours, ms": interval_text(row.median_ms, row.p20_ms, row.p80_ms, "{:.2f}".format),
                "samples": f"{row.num_samples:.0f}{marks_of(row._asdict())}",
                "ours over FA2": "" if dense_ms is None else f"{dense_ms / row.median_ms:.2f}x",
                "published FA2, ms": f"{paper.dense_ms:.2f}",
                "published PBS, ms": f"{paper.total_ms:.2f}",
                "published over FA2": f"{paper.speed_up:.2f}x",
            }


def _format(values: pd.Series, pattern: str) -> list[str]:
    return ["–" if pd.isna(value) else pattern.format(value) for value in values]

"""Ours beside the published numbers, and what is published and has not been measured."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from experiments.report.published_scores import FOLDER, compare_published, load_published
from experiments.report.runs import Results


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


def _format(values: pd.Series, pattern: str) -> list[str]:
    return ["–" if pd.isna(value) else pattern.format(value) for value in values]

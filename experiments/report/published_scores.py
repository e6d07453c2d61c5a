"""Scores of the papers, as data, and the table ours, published, difference."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from experiments.store import RunStore

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).resolve().parents[1] / "published_data"
COLUMNS = (
    *("source", "model", "method", "quantity", "unit", "ours", "published", "difference"),
    *("status", "note", "hash"),
)
# Of several runs of a method the one nearest to the published setting is shown.
_RANK = ("finished", "partial", "other setting", "failed", "not run")


@dataclass(frozen=True)
class PublishedScore:
    """One number of a paper.

    Attributes:
        bench: of this project.
        model: of this project.
        method: of this project.
        quantity: "average", or a part of the bench: a category, a length.
        value: 0 to 100.
        unit: what the value is.
        source: paper and table.
        setting: how it was measured there.
        harness: what measured it; numbers of two harnesses are not comparable.
        parameters: of the method, where they differ from this project's defaults.
    """

    bench: str
    model: str
    method: str
    quantity: str
    value: float
    unit: str
    source: str
    setting: str
    harness: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


def load_published(bench: str, model: str | None = None) -> list[PublishedScore]:
    """All published scores of a bench, in the order of their tables.

    Args:
        bench: of this project.
        model: only of this model.

    Returns:
        Empty if nothing is published.
    """
    path = FOLDER / f"{bench}.yaml"
    if not path.is_file():
        return []
    scores = list(_read(bench, yaml.safe_load(path.read_text(encoding="utf-8"))))
    return [score for score in scores if model in (None, score.model)]


def _read(bench: str, tables: Sequence[Mapping[str, Any]]) -> Iterator[PublishedScore]:
    for table in tables:
        for model, methods in table["tables"].items():
            for method, values in methods.items():
                for quantity, value in values.items():
                    yield PublishedScore(
                        bench=bench,
                        model=model,
                        method=method,
                        quantity=str(quantity),
                        value=float(value),
                        unit=table["unit"],
                        source=table["source"],
                        setting=" ".join(table["setting"].split()),
                        harness=table["harness"],
                        parameters=table.get("parameters", {}),
                    )


def compare_published(group: str | Path) -> pd.DataFrame:
    """Our runs of a bench and model beside the published scores.

    Args:
        group: folder ``<outputs>/<bench>/<model>``.

    Returns:
        A row per published score with the columns ``COLUMNS``. ``status``: "finished"; "partial"
        (a part of the bench only, or a part failed: the difference says little); "other setting"
        (the method's parameters are not the published ones); "failed"; "not run". ``note``: another
        harness, truncated prompts of ours. ``ours`` and
        ``difference`` (ours minus published, in points) are missing where there is no number.
    """
    group = Path(group)
    found = [_Run.read(path.parent) for path in sorted(group.glob("*/*/metrics.json"))]
    runs = [run for run in found if run is not None]
    rows = []
    for score in load_published(group.parent.name, group.name):
        candidates = [run.against(score) for run in runs if run.method == score.method]
        missing = {"status": "not run", "ours": None, "difference": None, "hash": None, "cut": ""}
        candidates.sort(key=lambda row: (_RANK.index(row["status"]), row.pop("order")))
        best = dict(candidates[0] if candidates else missing)
        harness = "" if score.harness == "opencompass" else f"harness: {score.harness}"
        note = "; ".join(filter(None, [harness, best.pop("cut")]))
        rows.append(
            {
                "source": score.source,
                "model": score.model,
                "method": _label(score),
                "quantity": score.quantity,
                "unit": score.unit,
                "published": score.value,
                "note": note,
                **best,
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


@dataclass(frozen=True)
class _Run:
    """A run of ours on disk."""

    method: str
    digest: str
    changed: Mapping[str, Any]
    metrics: Mapping[str, Any]
    seed: int

    @property
    def order(self) -> tuple[int, int, str]:
        """Of several runs of one kind the one with most samples counts, then the lowest seed."""
        total = (self.metrics.get("results") or {}).get("total", {})
        return -(total.get("num_samples") or 0), self.seed, self.digest

    @classmethod
    def read(cls, folder: Path) -> _Run | None:
        """None, with a warning, for a folder that another version wrote or something broke."""
        from experiments.report.compare import config_of
        from experiments.settings.names import changed_parameters
        from pbs.methods import METHODS

        try:
            cfg = config_of(folder)
            changed = changed_parameters(METHODS, cfg.method)
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            logger.warning("%s is left out of the published comparison: %s", folder, error)
            return None
        return cls(folder.parent.name, folder.name, changed, RunStore(folder).metrics(), cfg.seed)

    def against(self, score: PublishedScore) -> dict[str, Any]:
        """What this run says about a published score."""
        ours = _quantity(self.metrics, score.quantity)
        if self.metrics.get("status") == "finished":
            status = "partial" if self.metrics.get("partial") else "finished"
        else:
            status = "failed" if ours is None else "partial"
        if dict(self.changed) != dict(score.parameters):
            status = "other setting"
        return {
            "status": status,
            "ours": ours,
            "difference": None if ours is None else ours - score.value,
            "hash": self.digest,
            "order": self.order,
            "cut": self._truncated(),
        }

    def _truncated(self) -> str:
        total = self.metrics.get("results", {}).get("total", {})
        if not total.get("num_truncated"):
            return ""
        return f"{total['num_truncated']} of {total['num_samples']} prompts truncated"


def _quantity(metrics: Mapping[str, Any], quantity: str) -> float | None:
    results = metrics.get("results")
    if results is None:
        return None
    if quantity == "average":
        return results["total"].get("score")
    parts = {**results["total"].get("by_category", {}), **results.get("by_length", {})}
    return parts.get(quantity, {}).get("score")


def _label(score: PublishedScore) -> str:
    return " ".join([score.method, *(f"{key}={value}" for key, value in score.parameters.items())])


def format_published(frame: pd.DataFrame) -> str:
    """The comparison as Markdown, one table per source, missing numbers marked."""
    blocks = []
    for source, part in frame.groupby("source", sort=False):
        lines = [
            f"{source} ({part['unit'].iloc[0]})",
            "",
            "| method | quantity | ours | published | difference | status |",
            "| --- | --- | ---: | ---: | ---: | --- |",
        ]
        for row in part.itertuples():
            ours = "–" if pd.isna(row.ours) else f"{row.ours:.2f}"
            difference = "–" if pd.isna(row.difference) else f"{row.difference:+.2f}"
            status = f"{row.status}{'; ' + row.note if row.note else ''}"
            lines.append(
                f"| {row.method} | {row.quantity} | {ours} | {row.published:.2f} | {difference} "
                f"| {status} |"
            )
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)

"""What a run of these benches ends with: scores by task, and ours beside the published ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.files import write_atomically
from experiments.notes import name_of
from experiments.report.markdown import print_markdown
from experiments.report.published_scores import compare_published, format_published
from experiments.store import RunStore

FAILED = "failed"


def report_scores(
    group: Path, cells: Sequence[Path], everything: Sequence[Path], notes: Sequence[str]
) -> None:
    """Print and write both tables; nothing for benches without scores.

    Writes ``scores.csv``, ``scores.md``, ``published.csv`` and ``published.md`` into the folder.

    Args:
        group: folder ``<outputs>/<bench>/<model>``.
        cells: run folders in it, whose scores are printed.
        everything: run folders in it, whose scores are written.
        notes: what the written scores rest on; they go under the table in ``scores.md``.
    """
    scores = tabulate_scores(cells)
    if scores.empty:
        return
    text = format_scores(scores)
    scores = tabulate_scores(everything)
    published = compare_published(group)
    write_atomically(group / "scores.csv", scores.to_csv())
    write_atomically(group / "scores.md", "\n\n".join([format_scores(scores), *notes]) + "\n")
    if len(published):
        comparison = format_published(published)
        write_atomically(group / "published.csv", published.to_csv(index=False))
        write_atomically(group / "published.md", comparison + "\n")
    else:
        comparison = f"published: nothing for {group.parent.name} on {group.name}"
    print_markdown(f"{text}\n\n{comparison}")


def tabulate_scores(cells: Sequence[Path]) -> pd.DataFrame:
    """Scores by task (rows) and run (columns, by label), then by category or length, then overall.

    A part that failed is "failed", one that a run did not have is missing.
    """
    columns: dict[str, dict[str, Any]] = {}
    for folder in cells:
        metrics = RunStore(folder).metrics()
        results = metrics.get("results") or {}
        if "score" not in results.get("total", {}):
            continue
        label = metrics["label"]
        if label in columns:
            label = f"{label} {folder.name}"
        columns[label + (" (partial)" if metrics["partial"] else "")] = _column(results)
    return pd.DataFrame(columns)


def _column(results: Mapping[str, Any]) -> dict[str, Any]:
    column: dict[str, Any] = {}
    for cell in results["cells"]:
        column[name_of(cell)] = FAILED if cell["score"] is None else cell["score"]
    total = results["total"]
    for name, entry in total.get("by_category", {}).items():
        mark = "" if entry["is_complete"] else f" ({len(entry['tasks'])} tasks only)"
        column[f"= {name}{mark}"] = entry["score"]
    for kind in ("by_length", "by_difficulty", "by_length_class"):
        for name, entry in results.get(kind, {}).items():
            column[f"= {name}"] = FAILED if entry["score"] is None else entry["score"]
    if "task_average" in total:
        column["= mean over tasks"] = total["task_average"]
    column["= average"] = total["score"]
    return column


def format_scores(scores: pd.DataFrame) -> str:
    """The scores as Markdown."""
    lines = [
        f"| task | {' | '.join(scores.columns)} |",
        f"| --- |{' ---: |' * len(scores.columns)}",
    ]
    for name, row in scores.iterrows():
        lines.append(f"| {name} | {' | '.join(_text(value) for value in row)} |")
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "–" if value is None or pd.isna(value) else f"{value:.2f}"

"""What the numbers of a table rest on: samples of coverage, prompts that lost a part.

Said in the log, under every table and in the report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.store import Record

Row = dict[str, Any]

# Notes that a row may have, and the word that each begins with.
KINDS = {"coverage_basis": "coverage", "truncated": "truncated", "held_out_basis": "held-out"}
# What cells of results are called by.
NAMES = ("task", "length", "difficulty", "length_class")


def coverage_facts(records: Sequence[Record]) -> Row:
    """On what the coverage of some records was measured.

    Args:
        records: samples; those with a ``coverage`` have ``layer_coverage``, and say the
            ``coverage_heads`` (None: all) and ``coverage_rows`` (queries) that it is the mean of.

    Returns:
        ``num_coverage_samples``, and where that is not 0 ``coverage_layers``, ``coverage_heads``
        and ``coverage_rows``, the most of any sample.
    """
    measured = [record for record in records if record.get("coverage") is not None]
    if not measured:
        return {"num_coverage_samples": 0}
    layers = {int(layer) for record in measured for layer in record.get("layer_coverage", ())}
    rows = [record["coverage_rows"] for record in measured if "coverage_rows" in record]
    return {
        "num_coverage_samples": len(measured),
        "coverage_layers": sorted(layers),
        "coverage_heads": measured[0].get("coverage_heads"),
        "coverage_rows": max(rows, default=None),
    }


def describe_coverage(numbers: Mapping[str, Any]) -> str | None:
    """On what a run's coverage was measured; None if it has none.

    Args:
        numbers: a run's ``total``, with what :func:`coverage_facts` gives. ``num_prompts`` if a
            sample is not a whole prompt.
    """
    if not numbers.get("num_coverage_samples"):
        return None
    parts = [f"{numbers['num_coverage_samples']} of {numbers['num_samples']} samples"]
    if numbers.get("num_prompts"):
        parts = [f"{parts[0]} ({numbers['num_prompts']} prompts)"]
    if numbers.get("coverage_layers"):
        parts.append(f"layers {listed(numbers['coverage_layers'])}")
    heads = numbers.get("coverage_heads")
    parts.append("all heads" if heads is None else f"heads {listed(heads)}")
    if numbers.get("coverage_rows"):
        parts.append(f"at most {numbers['coverage_rows']} queries of each")
    return ", ".join(parts)


def describe_truncation(results: Mapping[str, Any]) -> str | None:
    """Which prompts lost a part of their text; None if all were whole.

    Args:
        results: of ``metrics.json``. A cell's prompts are its ``num_prompts``, else its
            ``num_samples``; cells of one name hold the same prompts.
    """
    counts = {name_of(cell): _counts(cell) for cell in results["cells"]}
    truncated = sum(cut for cut, _ in counts.values())
    total = sum(number for _, number in counts.values())
    if not truncated:
        return None
    named = [f"{name}: {cut} of {number}" for name, (cut, number) in counts.items() if cut]
    return f"{truncated} of {total} prompts ({', '.join(named)}), of whose text a part is missing"


def notes_of(rows: Sequence[Row]) -> list[str]:
    """Sentences under a table; runs that share one are named together.

    Args:
        rows: as of :func:`experiments.report.table.make_rows`.
    """
    notes = []
    for key, start in KINDS.items():
        labels: dict[str, list[str]] = {}
        for row in rows:
            if row.get(key):
                labels.setdefault(row[key], []).append(row["label"])
        for text, names in labels.items():
            of = "" if len(names) == len(rows) else f" ({', '.join(names)})"
            notes.append(f"{start}{of}: {text}")
    return notes


def name_of(cell: Mapping[str, Any]) -> str:
    """What a cell of results is called: its task, length, difficulty."""
    return " ".join(str(cell[key]) for key in NAMES if cell.get(key) is not None)


def _counts(cell: Mapping[str, Any]) -> tuple[int, int]:
    """Truncated prompts and all prompts."""
    return cell.get("num_truncated", 0), cell.get("num_prompts", cell.get("num_samples", 0))


def listed(numbers: Sequence[int]) -> str:
    """Numbers as text; three and more in a row as a range, as in "0, 3, 8-11"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [[f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run) for run in runs]
    return ", ".join(text for part in texts for text in part)

"""Writes the crossover table of ``method.dense_below=auto`` from results of ``make bench-gpu``.

    python -m experiments.crossover experiments/results/h100_2026-11-23

Needs no hydra and no wandb.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Iterable
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from experiments.speed.timing_report import break_evens
from experiments.store import write_atomically
from pbs.methods.crossover import PACKAGED, Crossover

# Which measurement decides, most telling first: the paper's densities, else the method's own.
SETTINGS = {"table7": "the paper's densities", "selection": "own selection on mixed inputs"}


def crossovers(results: dict[str, Any]) -> list[Crossover]:
    """One row per method and head shape, from the parts of a ``results.json``.

    Raises:
        ValueError: the results hold none of the parts that time single attention calls.
    """
    rows: dict[tuple[str, str], Crossover] = {}
    environment = results["environment"]
    for part, setting in SETTINGS.items():
        for entry in break_evens(results["parts"].get(part, [])):
            key = (entry["shape"], entry["method"])
            if entry["dense"] != "fastest" or key in rows:
                continue
            q_heads, kv_heads, head_dim = map(int, entry["shape"].split("/"))
            never = entry["break_even"] is None
            min_keys = entry["longest"] + 1 if never else round(entry["break_even"])
            rows[key] = Crossover(
                environment["device"],
                q_heads,
                kv_heads,
                head_dim,
                entry["method"],
                min_keys,
                setting,
                environment["commit"],
            )
    if not rows:
        raise ValueError(
            f"no part of these results tells a crossover; expected one of {', '.join(SETTINGS)}: "
            "run `make bench-gpu`"
        )
    return sorted(rows.values(), key=lambda row: (row.q_heads, row.kv_heads, row.method))


def to_csv(rows: Iterable[Crossover]) -> str:
    """The table as text."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Crossover)])
    writer.writerows(map(astuple, rows))
    return text.getvalue()


def main(arguments: list[str] | None = None) -> None:
    """Read results, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("results", type=Path, nargs="+", help="folders with a results.json")
    parser.add_argument("--out", type=Path, default=PACKAGED)
    options = parser.parse_args(arguments)
    rows = [
        row
        for folder in options.results
        for row in crossovers(json.loads((folder / "results.json").read_text(encoding="utf-8")))
    ]
    write_atomically(options.out, to_csv(rows))
    print(f"{len(rows)} rows in {options.out}")  # noqa: T201 - what the command did


if __name__ == "__main__":
    main()

"""Views of what a real model loses: runs of ``bench=likelihood`` in outputs, or committed ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from experiments.report.likelihood_table import likelihood_table
from experiments.report.pictures.likelihood_curves import likelihood_figures
from experiments.report.runs import Results
from experiments.timing.result_folders import COMMITTED


@dataclass(frozen=True)
class Likelihoods:
    """Runs of one model on one text and length.

    Attributes:
        title: a heading.
        folders: of the finished runs.
    """

    title: str
    folders: tuple[Path, ...]


def all_likelihoods(results: Results) -> list[Likelihoods]:
    """Those of an outputs folder."""
    return [
        Likelihoods(group.title, tuple(run.folder for run in group.runs))
        for group in results.of("likelihood")
    ]


def committed_likelihoods(root: Path = COMMITTED) -> list[Likelihoods]:
    """The newest that come with the project, a group for each length."""
    folder = newest_likelihood(root)
    found = []
    for group in sorted(path for path in folder.iterdir() if path.is_dir()):
        runs = sorted(path.parent for path in group.glob("*/*/metrics.json"))
        found.append(Likelihoods(f"{group.name}, {folder.parent.name}", tuple(runs)))
    return found


def newest_likelihood(root: Path) -> Path:
    """The newest folder below ``root`` with runs of ``bench=likelihood``; their names end in dates.

    Raises:
        FileNotFoundError: there is none.
    """
    found = sorted(root.glob("*/likelihood"), key=lambda path: path.parent.name.split("_")[-1])
    if not found:
        raise FileNotFoundError(
            f"{root} has no runs of bench=likelihood; see experiment=real_curves"
        )
    return found[-1]


def kl_table(likelihoods: Likelihoods) -> pd.DataFrame:
    """A row for each run and length, dense first, then by KL."""
    return pd.DataFrame(likelihood_table(likelihoods.folders))


def kl_curves(likelihoods: Likelihoods) -> list[Figure] | str:
    """KL against density and time, a figure for each length."""
    found = likelihood_figures(likelihoods.folders)
    return [figure for _, figure in found] or "No run here left anything out: nothing to draw."

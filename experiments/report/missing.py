"""What is missing in an outputs folder, each with the command that makes it."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from experiments.report.beside_published import unmeasured
from experiments.report.compare import dense_command
from experiments.report.runs import Group, Results
from experiments.settings.bench_names import BENCHES
from experiments.settings.config import DENSE
from pbs.methods import METHODS

# Columns of :func:`missing_table`.
COLUMNS = ("what", "why", "command")
# What fills an empty outputs folder.
FIRST_COMMAND = "make demo"

Gap = dict[str, str]


def nothing_yet(results: Results, what: str = "", command: str = FIRST_COMMAND) -> str:
    """A sentence for an outputs folder without a finished run, or without one of some kind.

    Args:
        results: what was read.
        what: of which kind, such as "with times".
        command: what makes one.
    """
    kind = f" {what}" if what else ""
    return f"No finished run{kind} in `{results.path}` yet: make some with `{command}`."


def missing_table(results: Results) -> pd.DataFrame:
    """Runs without a result, comparisons without a partner, benches and methods that never ran."""
    gaps = [*_problems(results)]
    for group in results.groups:
        gaps += _gaps(group)
    gaps += _benches(results)
    gaps += [
        {
            "what": f"{found.bench} on {found.model}",
            "why": f"published ({'; '.join(found.sources)}), not run",
            "command": f"python run.py -m method={','.join(found.methods)} bench={found.bench} "
            f"model={found.model}",
        }
        for found in unmeasured(results)
    ]
    return pd.DataFrame(gaps, columns=list(COLUMNS))


def _problems(results: Results) -> Iterator[Gap]:
    for problem in results.problems:
        reason = problem.reason.split("\n")[0]
        yield {
            "what": f"{problem.status}: {problem.folder.relative_to(results.path)}",
            "why": reason,
            "command": problem.command or "",
        }


def _gaps(group: Group) -> Iterator[Gap]:
    """Dense attention, and the methods that others of the group could be compared with."""
    run = group.runs[0]
    command = dense_command(run.cfg, run.metrics.get("overrides") or [])
    if group.has_answers and any(row.get("dense_command") for row in group.rows):
        yield {
            "what": f"dense attention in {group.title}",
            "why": "without it no difference and no speed-up can be given",
            "command": command,
        }
    ran = {run.method for run in group.runs}
    names = [name for name in METHODS.names if name not in ran and name != DENSE]
    if names:
        yield {
            "what": f"{len(names)} of {len(METHODS.names) - 1} sparse methods in {group.title}",
            "why": "not run",
            "command": command.replace(f"method={DENSE}", f"-m method={','.join(names)}", 1),
        }


def _benches(results: Results) -> Iterator[Gap]:
    """Benches without a finished run on any model."""
    for name in BENCHES.names:
        if not results.of(name):
            yield {
                "what": f"bench {name}",
                "why": "no finished run",
                "command": f"python run.py -m method={DENSE},meanpool,pbs bench={name}",
            }

"""The runs of an outputs folder, whoever made them, in groups that may be compared."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from experiments.report.compare import READ_ERRORS, config_of, is_plain_dense
from experiments.report.pictures.looks import LOOKS
from experiments.report.table import Row, flatten_settings, make_rows, metrics_in, times_dense
from experiments.results import find_runs
from experiments.settings.bench_names import BENCHES
from experiments.settings.config import RunConfig
from experiments.store import Record, RunStore


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: ``<outputs>/<bench>/<model>/<method>/<hash>``.
        config: its ``config.yaml``.
        cfg: the same, typed.
        metrics: its ``metrics.json``.
        environment: its ``env.json``; empty if there is none.
    """

    folder: Path
    config: Mapping[str, Any]
    cfg: RunConfig = field(repr=False)
    metrics: Mapping[str, Any] = field(repr=False)
    environment: Mapping[str, Any] = field(repr=False)

    @property
    def method(self) -> str:
        """The method's name."""
        return self.folder.parent.name

    @property
    def digest(self) -> str:
        """The name of its folder, the hash of its settings."""
        return self.folder.name

    @property
    def label(self) -> str:
        """The method with the settings that are not at their defaults."""
        return str(self.metrics.get("label", self.method))

    def samples(self) -> list[Record]:
        """Its raw samples."""
        return RunStore(self.folder).samples()


@dataclass(frozen=True)
class Problem:
    """A run folder without a result.

    Attributes:
        folder: where it lies.
        status: "failed", "unreachable", "interrupted" or "broken".
        reason: why there is no result.
        command: what makes or continues it; None if it cannot be told.
    """

    folder: Path
    status: str
    reason: str
    command: str | None = None


@dataclass(frozen=True)
class Group:
    """Finished runs that were asked the same: equal bench, its settings, model and seed.

    Attributes:
        bench: name of the bench.
        model: name of the model.
        note: what sets the group apart from the others of this bench and model; "" if it is alone.
        runs: dense attention first, then in the order of the table of looks.
        rows: one per run, as of :func:`experiments.report.table.make_rows`.
    """

    bench: str
    model: str
    note: str
    runs: tuple[Run, ...]
    rows: tuple[Row, ...] = field(repr=False)

    @property
    def title(self) -> str:
        """A heading."""
        return f"{self.bench} on {self.model}" + (f", {self.note}" if self.note else "")

    @property
    def has_answers(self) -> bool:
        """Whether any run has a metric of its bench."""
        names = [metric.name for metric in metrics_in(self.rows)]
        return any(row.get(name) is not None for row in self.rows for name in names)

    @property
    def is_timing(self) -> bool:
        """Whether its bench times dense attention itself, beside every method."""
        return times_dense(self.runs[0].cfg)

    @property
    def dense(self) -> Run | None:
        """The plain run of dense attention on just these samples."""
        return next((run for run in self.runs if is_plain_dense(run.cfg.method)), None)


@dataclass(frozen=True)
class Results:
    """Everything in an outputs folder.

    Attributes:
        path: the folder.
        groups: finished runs.
        problems: folders without a result.
    """

    path: Path
    groups: tuple[Group, ...]
    problems: tuple[Problem, ...]

    @property
    def runs(self) -> list[Run]:
        """All finished runs."""
        return [run for group in self.groups for run in group.runs]

    @property
    def answering(self) -> list[Group]:
        """Groups with right answers or scores."""
        return [group for group in self.groups if group.has_answers]

    @property
    def timing(self) -> list[Group]:
        """Groups of times."""
        return [group for group in self.groups if group.is_timing]

    def of(self, bench: str) -> list[Group]:
        """Groups of one bench."""
        return [group for group in self.groups if group.bench == bench]


def read_results(path: str | Path = "outputs") -> Results:
    """Read all run folders below ``path``; what cannot be read is a :class:`Problem`, no error."""
    runs: list[Run] = []
    problems: list[Problem] = []
    for folder in find_runs(path):
        found = read_run(folder)
        if isinstance(found, Run):
            runs.append(found)
        else:
            problems.append(found)
    by_set: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        bench, model = run.folder.parts[-4:-2]
        by_set.setdefault((bench, model, run.cfg.sample_set), []).append(run)
    groups = []
    for key, members in by_set.items():
        twins = [other for other in by_set if other[:2] == key[:2]]
        note = _difference(members[0], [by_set[twin][0] for twin in twins])
        group = _make_group(key[0], key[1], note, members, problems)
        if group is not None:
            groups.append(group)
    groups.sort(key=lambda group: (group.bench, group.model, group.note))
    return Results(Path(path), tuple(groups), tuple(problems))


def read_run(folder: Path) -> Run | Problem:
    """One run folder."""
    store = RunStore(folder)
    try:
        config = yaml.safe_load(store.config_path.read_text())
        metrics = store.metrics()
        environment = folder / "env.json"
        env = json.loads(environment.read_text()) if environment.exists() else {}
        if not metrics:
            return Problem(folder, "interrupted", "no metrics.json; the same command continues it")
        if metrics["status"] != "finished":
            error = metrics.get("error") or {}
            reason = f"{error.get('type')}: {error.get('message')}"
            return Problem(folder, metrics["status"], reason, command_of(metrics))
        cfg = config_of(folder)
        _ = cfg.sample_set, BENCHES.load(cfg.bench["name"])
        _ = metrics["results"]["total"], metrics["results"]["cells"], store.samples()
        return Run(folder, config, cfg, metrics, env)
    except READ_ERRORS as error:
        return Problem(folder, "broken", f"{type(error).__name__}: {error}")


def command_of(metrics: Mapping[str, Any]) -> str | None:
    """The command that made a run; None if the run does not say."""
    overrides = metrics.get("overrides")
    return None if not overrides else shlex.join(["python", "run.py", *overrides])


def _make_group(
    bench: str, model: str, note: str, members: Sequence[Run], problems: list[Problem]
) -> Group | None:
    """None, and a problem per run, if the runs cannot be made into a table."""
    known = {name: index for index, name in enumerate(LOOKS)}
    runs = sorted(members, key=lambda run: (known.get(run.method, len(known)), run.label))
    try:
        rows = make_rows([run.folder for run in runs], adds_dense=False)
    except READ_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
        problems += [Problem(run.folder, "broken", reason) for run in runs]
        return None
    return Group(bench, model, note, tuple(runs), tuple(rows))


def _difference(run: Run, others: Sequence[Run]) -> str:
    """The settings of bench, model and seed in which this run differs from one of the others."""

    own = flatten_settings(run.cfg)
    theirs = [flatten_settings(other.cfg) for other in others]
    return ", ".join(
        f"{key.removeprefix('bench.')}={value}"
        for key, value in own.items()
        if any(other.get(key) != value for other in theirs)
    )

"""The command line around Hydra: schemas, the help text, and errors a user can act on."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException, MissingConfigException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from experiments.config import CONF, ConfigError, RunConfig, make_schema

GROUPS = (
    "model",
    "method",
    "order",
    "selector",
    "bench",
    "match",
    "runner",
    "logger",
    "experiment",
    "debug",
    "paths",
)

HELP = """\
Compares sparse prefill attention methods: a model, a method, a bench.

    python run.py [-m] [GROUP=OPTION ...] [GROUP.KEY=VALUE ...]

Groups and options
{groups}
Examples
  python run.py method=pbs bench=needle
  python run.py method=pbs method.threshold=0.7 bench.tasks=[single,copy] bench.lengths=[1024,2048]
  python run.py -m method=flash,meanpool,pbs bench=needle model=tiny
  python run.py -m method=pbs method.threshold=0.5,0.7,0.9 method.block_size=64,128 bench=needle
  python run.py method=pbs model=hf model.path=/path/to/a/checkpoint
  python run.py method=meanpool match=density match.target=0.3
  python run.py experiment=demo

Keys and their values: add --cfg job, as in `python run.py method=pbs --cfg job`.
Results: <paths.outputs>/<bench>/<model>/<method>/<hash>/. The same command again continues an
interrupted run and skips a finished one. Exit status 1: a cell failed (-m runs the others).
"""


def register_configs(*, with_parameters: bool = True) -> None:
    """Give Hydra the types of all settings.

    Args:
        with_parameters: False leaves out the parameters of methods and benches, and with them the
            seconds it takes to import torch: enough for the help text.
    """
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    store.store(group="hydra/help", name="pbs", node={"template": HELP.format(groups=_groups())})
    for kind in ("method", "bench"):
        for path in sorted((CONF / kind).glob("*.yaml")):
            if not with_parameters:
                store.store(group=f"schema/{kind}", name=path.stem, node={})
    if not with_parameters:
        return
    from experiments.bench import BENCHES
    from pbs.methods import METHODS

    for registry in (METHODS, BENCHES):
        for name in registry.names:
            node = OmegaConf.structured(make_schema(registry.load(name), name))
            for key in node:
                if isinstance(node[key], DictConfig):
                    OmegaConf.set_struct(node[key], False)
            store.store(group=f"schema/{registry.kind}", name=name, node=node)


def explain_errors(run: Callable[[], Any]) -> int:
    """Call ``run``; say what a user got wrong in a few lines. Returns the exit status.

    HYDRA_FULL_ERROR=1 shows the traceback as well.
    """
    # Hydra prints errors and exits by itself; with this variable it hands them to us.
    CollectCells.folders.clear()
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        run()
    except (CompactHydraException, OmegaConfBaseException, ValueError, OSError) as error:
        if wants_traceback:
            raise
        sys.stderr.write(f"{explain(error)}\n")
        return 1
    if not CollectCells.folders:  # a command that shows settings and runs nothing
        return 0
    from experiments.summary import report

    return report(CollectCells.folders)


class CollectCells(Callback):
    """Notes the folders of all cells that ran, also those that another process ran.

    Hydra hands the results of a sweep's jobs to nobody, so each job leaves its folder's name in
    the sweep's directory.
    """

    folders: ClassVar[list[Path]] = []

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """In the process of the job."""
        if config.hydra.mode == RunMode.MULTIRUN and job_return.status == JobStatus.COMPLETED:
            note = Path(config.hydra.sweep.dir, "cells", f"{config.hydra.job.num:05d}.txt")
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(job_return.return_value)

    def on_run_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:  # noqa: ARG002
        """One cell."""
        if job_return.status == JobStatus.COMPLETED:
            self.folders.append(Path(job_return.return_value))

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """All cells of a sweep, in their order."""
        notes = sorted(Path(config.hydra.sweep.dir, "cells").glob("*.txt"))
        self.folders.extend(Path(note.read_text()) for note in notes)


def explain(error: Exception) -> str:
    """What is wrong with a setting, what is valid, and what is nearest."""
    from pbs.registry import unknown

    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return unknown(f"option of group {group!r}:", option, error.options)
    if isinstance(error, ConfigError):
        return str(error)
    if "Config group override must be a string" in str(error):
        return "a group cannot be null: leave it out, or remove it with ~GROUP"
    part = re.search(r"In '(order|selector)/(\w+)'.*object_type=(\w+)", str(error), re.DOTALL)
    if part:
        group, option, method = part.groups()
        return f"{method} has no {group}: leave out {group}={option}, or choose a method with one"
    cause = error.__cause__ or error
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and cause.key is not None:
        parent, _, key = str(cause.full_key or cause.key).rpartition(".")
        node = cause.parent_node
        valid = [str(name) for name in node] if isinstance(node, DictConfig) else []
        if not parent:
            valid = sorted({*GROUPS, *valid} - {"hydra"})
        where = f" of {parent!r}" if parent else " or group"
        if isinstance(node, DictConfig) and OmegaConf.select(node, "name"):
            where += f" ({node.name})"
        return unknown(f"key{where}:", key, valid)
    if isinstance(cause, OmegaConfBaseException):
        key = f"{cause.full_key}: " if cause.full_key else ""
        return f"{key}{str(cause).splitlines()[0]}"
    return str(error)


def _groups() -> str:
    """Every group with its options and the first line of each option's file."""
    lines = []
    for group in GROUPS:
        lines.append(f"  {group}")
        for path in sorted((CONF / group).glob("*.yaml")):
            lines.append(f"    {path.stem:<18} {_headline(path)}")
    # Hydra fills in $NAMES in a help text.
    return ("\n".join(lines) + "\n").replace("$", "$$")


def _headline(path: Path) -> str:
    """The first comment that is not an instruction to Hydra."""
    for line in path.read_text().splitlines():
        if line.startswith("# ") and not line.startswith("# @package"):
            return line[2:]
    return ""

"""The command line around Hydra: schemas, the help text, and errors a user can act on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments.run.help import explain_parameters, list_groups
from experiments.settings.config import (
    CONF,
    ConfigError,
    LoggerConfig,
    PathsConfig,
    RunConfig,
    make_schema,
)
from experiments.settings.credentials import hide, refuse_in_words
from experiments.settings.explain import explain
from experiments.settings.words import check_words

INTERRUPTED = 130  # exit status of a command that Ctrl-C ended, as in a shell

HELP = """\
Compares sparse prefill attention methods: a model, a method, a bench.

    python run.py [-m] [GROUP=OPTION ...] [GROUP.KEY=VALUE ...]

Groups and options
{groups}
{parameters}Examples
  python run.py method=pbs bench=needle
  python run.py method=pbs method.threshold=0.7 bench.tasks=[single,copy] bench.lengths=[1024,2048]
  python run.py -m method=flash,meanpool,pbs bench=needle model=tiny
  python run.py -m method=pbs method.threshold=0.5,0.7,0.9 method.block_size=64,128 bench=needle
  python run.py method=pbs model=hf model.path=/path/to/a/checkpoint
  python run.py method=meanpool match=density match.target=0.3
  python run.py experiment=demo

What parameters mean: add --help, as in `python run.py method=pbs bench=needle --help`; all keys and
their values: --cfg job.
Results: <paths.outputs>/<bench>/<model>/<method>/<hash>/. The same command again continues an
interrupted run and skips a finished one. Exit status 1: a cell failed (-m runs the others); 130: it
was stopped by Ctrl-C.
"""


def register_configs(*, with_parameters: bool = True, explained: Sequence[str] = ()) -> None:
    """Give Hydra the types of all settings.

    Args:
        explained: words such as ``method=pbs``, whose parameters the help text explains.
        with_parameters: False leaves out the parameters of methods and benches, and with them the
            seconds it takes to import torch: enough for the help text.
    """
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    parameters = explain_parameters(explained).replace("$", "$$") if explained else ""
    text = HELP.format(groups=list_groups(), parameters=f"{parameters}\n\n" if parameters else "")
    store.store(group="hydra/help", name="pbs", node={"template": text})
    for kind in ("method", "bench"):
        for path in sorted((CONF / kind).glob("*.yaml")):
            if not with_parameters:
                store.store(group=f"schema/{kind}", name=path.stem, node={})
    if not with_parameters:
        return
    from experiments.settings.bench_names import BENCHES
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
    CollectCells.clear()
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    # Hydra prints errors and exits by itself; with this variable it hands them to us.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        refuse_in_words(sys.argv[1:])
        sys.argv[1:] = flags_first(sys.argv[1:])
        check_words([word for word in sys.argv[1:] if not word.startswith("-")])
        run()
        status = 0
        if CollectCells.folders:
            from experiments.run.summary import report

            status = report(
                CollectCells.folders, figure=CollectCells.figure, tracking=CollectCells.tracking
            )
        elif CollectCells.is_empty_sweep:
            raise ConfigError("the sweep has no cells: a list of values in it is empty")
    except KeyboardInterrupt as error:
        if wants_traceback:
            raise
        what = str(error) or "no cell had begun"
        sys.stderr.write(f"\nstopped; {hide(what)}; the same command continues\n")
        return INTERRUPTED
    except Exception as error:  # the edge of the program
        if wants_traceback:
            raise
        sys.stderr.write(f"{hide(explain(error))}\n")
        status = 1
    for failure in CollectCells.failures:
        sys.stderr.write(f"failed: {failure}\n")
    return 1 if CollectCells.failures else status


class CollectCells(Callback):
    """Notes the folders of all cells that ran, also those that another process ran.

    Hydra hands the results of a sweep's jobs to nobody, so each job leaves its folder's name in
    the sweep's directory. A job without a folder, because of a wrong setting or because nothing can
    be written, leaves its error there, and the others go on.
    """

    folders: ClassVar[list[Path]] = []
    failures: ClassVar[list[str]] = []
    figure: ClassVar[str | None] = None
    tracking: ClassVar[tuple[LoggerConfig, PathsConfig] | None] = None
    is_empty_sweep: ClassVar[bool] = False
    # Of jobs in the process of the command whose note could not be written.
    _unwritten: ClassVar[list[str]] = []
    _process: ClassVar[int | None] = None

    @classmethod
    def clear(cls) -> None:
        """Forget the cells of an earlier command in this process."""
        cls.folders.clear()
        cls.failures.clear()
        cls._unwritten.clear()
        cls.figure = cls.tracking = None
        cls.is_empty_sweep = False
        cls._process = os.getpid()

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Remove the notes of an earlier sweep in a directory that a user has chosen."""
        for note in _notes(config):
            note.unlink()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """In the process of the job."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        name = f"{config.hydra.job.num:05d}"
        if job_return.status == JobStatus.COMPLETED:
            suffix, text = "folder", job_return.return_value
        else:
            words = " ".join(config.hydra.overrides.task)
            suffix, text = "error", hide(f"{words}: {explain(job_return._return_value)}")
        note = Path(config.hydra.sweep.dir, "cells", f"{name}.{suffix}")
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(text, encoding="utf-8")
        except OSError as error:
            if self._process != os.getpid():  # nobody would know: the error ends the sweep
                job_return.status, job_return.return_value = JobStatus.FAILED, error
                return
            self._unwritten.append(text if suffix == "error" else f"{text}: {explain(error)}")
        # Hydra would end the sweep with the first error, before the table of the other cells.
        job_return.status, job_return.return_value = JobStatus.COMPLETED, text

    def on_run_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """One cell."""
        if job_return.status == JobStatus.COMPLETED:
            self._note_settings(config)
            self.folders.append(Path(job_return.return_value))

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """All cells of a sweep, in their order."""
        for note in _notes(config):
            text = note.read_text(encoding="utf-8")
            if note.suffix == ".folder":
                self.folders.append(Path(text))
            else:
                self.failures.append(text)
        self.failures.extend(self._unwritten)
        if self.folders:
            self._note_settings(config)
        type(self).is_empty_sweep = not self.folders and not self.failures

    def _note_settings(self, config: DictConfig) -> None:
        """What the command says about all its cells, whatever their folders' configs say."""
        cls = type(self)
        cls.figure = config.figure
        logger, paths = (
            OmegaConf.to_container(config[group], resolve=True) for group in ("logger", "paths")
        )
        cls.tracking = LoggerConfig(**logger), PathsConfig(**paths)


def _notes(config: DictConfig) -> list[Path]:
    folder = Path(config.hydra.sweep.dir, "cells")
    return sorted([*folder.glob("*.folder"), *folder.glob("*.error")])


def flags_first(words: Sequence[str]) -> list[str]:
    """The same words with Hydra's flags in front: it reads no settings after a flag among them.

    Raises:
        ConfigError: a flag that Hydra does not have, or without the value that it takes.
    """
    parser = get_args_parser()
    parser.error = _refuse_flag
    # The value of --info may be left out: a setting behind it is none.
    infos = [
        "--info=all" if word in ("-i", "--info") and "=" in following else word
        for word, following in zip_longest(words, words[1:], fillvalue="")
    ]
    found = vars(parser.parse_intermixed_args(infos))
    settings = found.pop("overrides")
    flags = []
    for name, value in found.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            flags.append(flag)
        elif value not in (None, False):
            flags.append(f"{flag}={value}")
    return [*flags, *settings]


def _refuse_flag(message: str) -> NoReturn:
    raise ConfigError(f"{message}; --help and --hydra-help list what there is")

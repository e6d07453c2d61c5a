"""Parts of a bench in processes of their own, through OpenCompass's runners. Imports OpenCompass.

Each process loads the model and answers one part into a folder of its own; this process then takes
the answers over, scores them and lets OpenCompass evaluate, as if it had answered itself.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from mmengine.config import Config
from opencompass.registry import MODELS
from opencompass.runners import LocalRunner, SlurmRunner
from opencompass.runners import slurm as slurm_module
from transformers import AutoTokenizer
from typing_extensions import override

from experiments.benches.base import Context
from experiments.benches.opencompass.model import PatchedModel
from experiments.benches.opencompass.parts import Part
from experiments.models.load import LoadedModel, load_model, resolve_path
from experiments.settings.config import ROOT, ConfigError, RunConfig, parameters
from experiments.settings.environment import describe_environment
from experiments.store import Record, RunStore
from pbs.methods import build_method
from pbs.patch.huggingface import apply_patch_with_prefill

if TYPE_CHECKING:
    from experiments.benches.opencompass.base import OpenCompassBench

logger = logging.getLogger(__name__)

TASK = "opencompass.tasks.OpenICLInferTask"
NUM_LOG_LINES = 15


class WorkerError(RuntimeError):
    """A worker's process ended without all answers; the message has the end of its log."""


def run_parts(
    bench: OpenCompassBench,
    parts: Sequence[Part],
    context: Context,
    known: Mapping[str, Record],
    work_dir: Path,
) -> None:
    """Answer all parts that are not complete in processes of their own, then evaluate all.

    Raises:
        ConfigError: ``model.tp``, whose processes these runners do not start.
        SystemExit: after a dry run.
    """
    cfg = context.cfg
    if cfg.model.tp:
        raise ConfigError(
            f"runner={cfg.runner.name} starts one process a task; model.tp=true needs torchrun "
            "and runner=process. model.device_map=auto with runner.gpus=N spreads layers instead"
        )
    work_dir = work_dir.resolve()
    folder = context.folder.resolve()
    if not cfg.resume:
        shutil.rmtree(folder / "workers", ignore_errors=True)
    open_parts = [part for part in parts if _num_known(part, known) < bench.num_used(part)]
    configs = [_task_config(bench, part, cfg, folder, work_dir) for part in open_parts]
    logs = dict(zip((part.key for part in open_parts), map(_log_of, configs), strict=True))
    with _inside(work_dir):
        if cfg.runner.dry_run:
            _show(cfg, configs)
        if configs:
            logger.info(
                "%d tasks with runner=%s, logs: %s", len(configs), cfg.runner.name, work_dir
            )
            _make_runner(cfg)(configs)
    tokenizer = AutoTokenizer.from_pretrained(
        resolve_path(cfg.model.path), trust_remote_code=cfg.model.trust_remote_code
    )
    for part in parts:
        worker = RunStore(_worker_folder(folder, part))
        answers = worker.samples()
        for environment in reversed(worker.environments().values()):
            RunStore(folder).write_environment(environment)
        model = AnsweredModel(tokenizer, bench.chat_options, answers, logs.get(part.key))
        bench.attempt(
            part,
            lambda part=part, model=model: bench.run_part(part, model, context, known, work_dir),
        )
        if part.key not in bench.failures:
            shutil.rmtree(work_dir / part.key / "predictions", ignore_errors=True)
            shutil.rmtree(_worker_folder(folder, part), ignore_errors=True)


@MODELS.register_module()
class WorkerModel(PatchedModel):
    """The model of one worker: loads, patches, and keeps its answers in the worker's folder.

    Args:
        run: the run's configuration.
        folder: the run's folder.
        part: the part to answer.
    """

    def __init__(self, run: Mapping[str, Any], folder: str, part: str, **_: Any) -> None:
        cfg = RunConfig.from_dict(_plain(run))
        method = build_method(cfg.method["name"], **parameters(cfg.method))
        loaded = load_model(cfg.model)
        if cfg.check:
            from experiments.gate.safety import run_gate

            run_gate(loaded.model, loaded.tokenizer, method, device=loaded.device, seed=cfg.seed)
        apply_patch_with_prefill(loaded.model, method)
        bench = parameters(cfg.bench)
        super().__init__(
            loaded, max_seq_len=bench["max_seq_len"], chat_options=bench["chat_options"]
        )
        store = RunStore(_worker_folder(Path(folder), Part(part, {})))
        environment = describe_environment()
        # Held until this process ends: an orphan of a killed run may still be at it.
        self._lock = store.lock()
        self._lock.__enter__()
        store.write_environment(environment)
        records = [*RunStore(Path(folder)).samples(), *store.samples()]
        prefix = f"{part}/"
        known = {
            int(record["sample_id"].removeprefix(prefix)): record
            for record in records
            if record["sample_id"].startswith(prefix)
        }

        def add(index: int, record: Record) -> None:
            with store.appending() as appender:
                appender.append(
                    {
                        "sample_id": f"{prefix}{index}",
                        "environment": environment["id"],
                        **record,
                    }
                )

        self.begin(known, add)


class AnsweredModel(PatchedModel):
    """Gives the answers that a worker left behind.

    Args:
        tokenizer: of the model.
        chat_options: see :class:`PatchedModel`.
        answers: the worker's records.
        log: the worker's log, if it ran now.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_options: Mapping[str, Any],
        answers: Sequence[Record],
        log: Path | None,
    ) -> None:
        super().__init__(LoadedModel(None, tokenizer, 0), chat_options=chat_options)
        self._answers = {int(answer["sample_id"].rpartition("/")[2]): answer for answer in answers}
        self._log = log

    @override
    def answer_sample(self, index: int, text: str, max_out_len: int) -> Record:
        """See the base class.

        Raises:
            WorkerError: the worker did not answer this sample.
        """
        if index not in self._answers:
            raise WorkerError(
                f"the process of this task ended before sample {index}:\n{_tail(self._log)}"
            )
        return {key: value for key, value in self._answers[index].items() if key != "sample_id"}


def _num_known(part: Part, known: Mapping[str, Record]) -> int:
    return sum(name.rpartition("/")[0] == part.key for name in known)


def _worker_folder(folder: Path, part: Part) -> Path:
    return folder / "workers" / part.key


def _task_config(
    bench: OpenCompassBench, part: Part, cfg: RunConfig, folder: Path, work_dir: Path
) -> Config:
    """What OpenCompass writes to a file for the worker: plain data, classes by their names."""
    gpus = cfg.runner.gpus
    if gpus is None:
        import torch

        gpus = min(1, torch.cuda.device_count())
    dataset = bench.limited_dataset(part, cfg)
    dataset["infer_cfg"]["inferencer"]["output_json_filepath"] = str(work_dir / "predictions")
    model = {
        "type": f"{WorkerModel.__module__}.{WorkerModel.__qualname__}",
        "abbr": f"{cfg.method['name']}-{cfg.hash}",
        "run": cfg.to_dict(),
        "folder": str(folder),
        "part": part.key,
        "max_out_len": bench.max_out_len,
        "batch_size": 1,
        "run_cfg": {"num_gpus": gpus, "num_procs": 1},
    }
    return Config(
        {"models": [model], "datasets": [[_by_name(dataset)]], "work_dir": str(work_dir / part.key)}
    )


def _by_name(value: Any) -> Any:
    """The same config with every class and function as a dotted name."""
    if isinstance(value, Mapping):
        return {key: _by_name(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_by_name(entry) for entry in value]
    if isinstance(value, type) or callable(value):
        return f"{value.__module__}.{value.__qualname__}"
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def _make_runner(cfg: RunConfig) -> Callable[[Sequence[Config]], None]:
    task = {"type": TASK}
    if cfg.runner.name == "local":
        return LocalRunner(task=task, max_num_workers=cfg.runner.workers)
    return SlurmRunner(
        task=task,
        max_num_workers=cfg.runner.workers,
        partition=cfg.runner.partition,
        extra_command=list(cfg.runner.options),
        debug=cfg.runner.dry_run,
        retry=0 if cfg.runner.dry_run else 2,
    )


def _show(cfg: RunConfig, configs: Sequence[Config]) -> None:
    """Let the runner build its commands and log them instead of running them."""
    commands: list[str] = []

    def run(command: str, **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    if cfg.runner.name != "slurm":
        raise ConfigError("runner.dry_run shows Slurm's commands; it needs runner=slurm")
    real = slurm_module.subprocess
    slurm_module.subprocess = SimpleNamespace(run=run)
    try:
        _make_runner(cfg)(configs)
    finally:
        slurm_module.subprocess = real
    for command in commands:
        logger.info("%s", command)
    logger.info("dry run: %d commands shown, nothing was started", len(commands))
    raise SystemExit(0)


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Work in a folder: OpenCompass's runners write to ./tmp. Workers find this project."""
    before = Path.cwd()
    old_path = os.environ.get("PYTHONPATH")
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), old_path]))
    try:
        yield
    finally:
        os.chdir(before)
        if old_path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = old_path


def _log_of(config: Config) -> Path:
    from opencompass.tasks import OpenICLInferTask

    return Path(OpenICLInferTask(config).get_log_path(file_extension="out"))


def _tail(log: Path | None) -> str:
    if log is None or not log.exists():
        return "(no log)"
    lines = log.read_text(errors="replace").splitlines()[-NUM_LOG_LINES:]
    return "\n".join([*lines, f"({shlex.quote(str(log))})"])

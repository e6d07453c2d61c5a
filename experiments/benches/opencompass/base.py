"""What the benches of OpenCompass share: parts, samples, scores. Quick to import."""

from __future__ import annotations

import logging
import math
import shutil
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from typing_extensions import override

from experiments.benches.base import Bench, Context
from experiments.benches.opencompass.files import MissingDataError, find_folder
from experiments.benches.opencompass.parts import Part
from experiments.metrics import ACCURACY, SCORE
from experiments.run_environments import prefill_times
from experiments.settings.config import ConfigError
from experiments.settings.words import NO_SLURM
from experiments.store import Record
from pbs.registry import unknown

if TYPE_CHECKING:
    from experiments.benches.opencompass.harness import EvaluatedTask
    from experiments.benches.opencompass.model import PatchedModel
    from experiments.settings.config import RunConfig

logger = logging.getLogger(__name__)

# RULER's metrics are rounded to two decimals, of a sample and of a task.
SCORE_TOLERANCE = 0.011

_Item = TypeVar("_Item")
_Key = TypeVar("_Key")


@dataclass(kw_only=True)
class OpenCompassBench(Bench):
    """A bench whose prompts, inference loop, post-processing and metrics are OpenCompass's.

    Args:
        tasks: which tasks of the bench.
        fraction: share of every task's samples, from the first; marks the result as partial.
        data_dir: folder with the benchmark's own files.
        max_seq_len: prompt plus answer, in tokens; longer prompts lose their middle.
        max_out_len: tokens of an answer.
        chat_options: variables of the model's chat template, such as ``enable_thinking``.
    """

    all_tasks: ClassVar[tuple[str, ...]] = ()
    metrics = (ACCURACY, SCORE)
    which_samples = ("limit", "tasks", "fraction")
    # Whether OpenCompass's configs say how long an answer may be.
    states_out_len: ClassVar[bool] = False

    tasks: list[str] = field(default_factory=list)
    fraction: float | None = None
    data_dir: str | None = None
    max_seq_len: int | None = None
    max_out_len: int | None = None
    chat_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        for task in self.tasks:
            if task not in self.all_tasks:
                raise ValueError(unknown(f"task of {name}:", task, self.all_tasks))
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(
                f"bench.tasks must name at least one task, each once, got {self.tasks}"
            )
        self.check_sizes()
        if self.max_out_len is None and not self.states_out_len:
            raise ValueError(f"bench.max_out_len needs a number: OpenCompass has none for {name}")

    def check_sizes(self) -> None:
        """Check what says how much of each part runs."""
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"bench.fraction must lie in (0, 1], got {self.fraction}")
        for key in ("max_seq_len", "max_out_len"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"bench.{key} must be positive, got {value}")

    @property
    def is_partial(self) -> bool:
        """Whether samples or tasks are left out."""
        is_cut = self.limit is not None or (self.fraction is not None and self.fraction < 1)
        return is_cut or set(self.tasks) != set(self.all_tasks)

    @classmethod
    def input_files(cls, settings: Mapping[str, Any]) -> dict[str, Path]:
        """See the base class: what :meth:`data_files` names in ``data_dir``."""
        if not settings.get("data_dir"):
            return {}
        try:
            folder = find_folder(settings["data_dir"])
        except MissingDataError:  # said where the data are read
            return {}
        found = [folder / name for name in cls.data_files(folder, settings["tasks"])]
        return {f"data_dir/{path.relative_to(folder)}": path for path in found if path.is_file()}

    @classmethod
    @abstractmethod
    def data_files(cls, folder: Path, tasks: Sequence[str]) -> list[str]:
        """Names of the files in ``data_dir`` that these tasks read."""

    @abstractmethod
    def prepare_data(self, cfg: RunConfig) -> None:
        """Find the files.

        Raises:
            MissingDataError: a file is not there; says which and where it comes from.
        """

    @abstractmethod
    def parts(self) -> list[Part]:
        """The data sets, in the order they run."""

    @abstractmethod
    def num_rows(self, part: Part) -> int:
        """Samples there are."""

    @abstractmethod
    def dataset(self, part: Part, cfg: RunConfig) -> Any:
        """OpenCompass's config of the data set."""

    @override
    def facts(self, sample: Record, score: float) -> Record:
        """What else a record says about its sample."""
        return {}

    def averages(self, cells: Sequence[Record]) -> dict[str, Any]:
        """The overall score and what it is made of, from the scores of the parts."""
        return {"score": mean(cell["score"] for cell in cells)}

    @override
    def weight(self, labels: Record, cells: Sequence[Record]) -> float:
        """Share of a part in the overall score; the weights of all ``cells`` add up to 1."""
        return 1 / len(cells)

    def prepare(self, cfg: RunConfig) -> None:
        """See the base class: OpenCompass and the data, before any model is loaded.

        Raises:
            ConfigError: OpenCompass or Slurm is not installed, or files are missing.
        """
        if find_spec("opencompass") is None:
            raise ConfigError(
                f"bench={cfg.bench['name']} needs OpenCompass; install it with: "
                "pip install -e '.[eval]' (Python 3.10 to 3.12)"
            )
        if cfg.runner.name == "slurm" and not cfg.runner.dry_run and shutil.which("srun") is None:
            raise ConfigError(
                f"runner=slurm needs {NO_SLURM}, or choose runner=local; runner.dry_run=true shows "
                "the commands"
            )
        self.prepare_data(cfg)
        # With another runner the model is loaded where it answers, not here.
        self.needs_model = cfg.runner.name == "process"

    def num_used(self, part: Part) -> int:
        """Samples to measure."""
        used = self.num_rows(part)
        if self.fraction is not None:
            used = math.ceil(used * self.fraction)
        return used if self.limit is None else min(used, self.limit)

    def limited_dataset(self, part: Part, cfg: RunConfig) -> Any:
        """The data set with only the samples to measure, and our length of answers if it is set."""
        dataset = self.dataset(part, cfg)
        dataset["reader_cfg"]["test_range"] = f"[:{self.num_used(part)}]"
        if self.max_out_len is not None:
            dataset["infer_cfg"]["inferencer"]["max_out_len"] = self.max_out_len
        return dataset

    def run(self, context: Context) -> None:
        """See the base class: every part in its own try; failures are kept, the others go on."""
        from experiments.benches.opencompass.harness import quiet

        self.failures.clear()
        parts = [
            part
            for part in self.parts()
            if self.attempt(part, lambda part=part: self.num_used(part))  # reads its file
        ]
        context.announce(sum(self.num_used(part) for part in parts))
        known = {record["sample_id"]: record for record in context.records()}
        # OpenCompass would continue from files of its own; ours are the truth.
        work_dir = context.folder / "opencompass"
        shutil.rmtree(work_dir, ignore_errors=True)
        with quiet(work_dir / "opencompass.log"):
            if context.cfg.runner.name != "process":
                from experiments.benches.opencompass.cluster import run_parts

                run_parts(self, parts, context, known, work_dir)
            else:
                self._run_here(parts, context, known, work_dir)
        if self.failures:
            logger.warning("%d of %d parts failed", len(self.failures), len(self.parts()))

    def _run_here(
        self,
        parts: Sequence[Part],
        context: Context,
        known: Mapping[str, Record],
        work_dir: Path,
    ) -> None:
        from experiments.benches.opencompass.model import PatchedModel
        from pbs.patch.huggingface import apply_patch_with_prefill

        with apply_patch_with_prefill(context.model.model, context.method):
            model = PatchedModel(
                context.model, max_seq_len=self.max_seq_len, chat_options=self.chat_options
            )
            for part in parts:
                self.attempt(
                    part, lambda part=part: self.run_part(part, model, context, known, work_dir)
                )

    def attempt(self, part: Part, action: Callable[[], object]) -> bool:
        """Do something for a part, and say whether it worked: an error ends this part only."""
        try:
            action()
            return True
        except Exception as error:  # a part's failure is a result
            from experiments.settings.failures import release_after_failure

            self.fail(part, error)
            failure = self.failures[part.key]
            logger.exception("%s failed: %s: %s", part.key, failure["type"], failure["message"])
            release_after_failure()
            return False

    def fail(self, part: Part, error: BaseException) -> None:
        """Note that a part has no result."""
        from experiments.settings.failures import describe_failure

        self.failures[part.key] = {**part.labels, **describe_failure(error)}

    def make_task(self, part: Part, cfg: RunConfig, work_dir: Path) -> EvaluatedTask:
        """The part as OpenCompass runs it; the abbreviation holds the identity of the run."""
        from experiments.benches.opencompass.harness import EvaluatedTask

        return EvaluatedTask(
            self.limited_dataset(part, cfg),
            abbr=f"{cfg.method['name']}-{cfg.hash}",
            work_dir=work_dir,
        )

    def run_part(
        self,
        part: Part,
        model: PatchedModel,
        context: Context,
        known: Mapping[str, Record],
        work_dir: Path,
    ) -> None:
        """Answer what is not known, and let OpenCompass evaluate all of it.

        Raises:
            ValueError: the mean of the samples' scores is not OpenCompass's score of the task.
        """
        from experiments.benches.opencompass.harness import overall

        task = self.make_task(part, context.cfg, work_dir)
        scorer = task.scorer()
        prefix = f"{part.key}/"
        own = {
            int(name.removeprefix(prefix)): record
            for name, record in known.items()
            if name.startswith(prefix)
        }
        scores = {index: record["score"] for index, record in own.items()}

        def add(index: int, record: Record) -> None:
            score = scorer.score(index, record["completion"])
            scores[index] = score
            sample_id = f"{prefix}{index}"
            labels = {**part.labels, **self.facts(scorer.samples[index], score)}
            context.add(
                {
                    "sample_id": sample_id,
                    **labels,
                    "score": score,
                    "reference": scorer.gold(index),
                    **record,
                }
            )

        model.begin(own, add)
        task.infer(model)
        theirs = overall(task.evaluate())
        ours = sum(scores.values()) / len(scores)
        if abs(ours - theirs) > SCORE_TOLERANCE:
            raise ValueError(
                f"the scores of the samples of {part.key} average to {ours:.4f}, OpenCompass's "
                f"score of the task is {theirs:.4f}; a record does not belong to this run: "
                "resume=false measures everything anew"
            )
        task.remove_predictions()
        logger.info("%s: %.2f on %d samples", part.key, theirs, len(scores))

    def without_failures(self, records: Sequence[Record]) -> list[Record]:
        """Records of the parts that have a result."""
        return [
            record
            for record in records
            if record["sample_id"].rpartition("/")[0] not in self.failures
        ]

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """See the base class: averages over the parts; a part that failed has no score."""
        kept = self.without_failures(records)
        by_part = group(kept, lambda record: record["sample_id"].rpartition("/")[0])
        cells = []
        for part in self.parts():
            if part.key in by_part or part.key in self.failures:
                cells.append({**part.labels, **measure(by_part.get(part.key, []))})
        measured = [cell for cell in cells if cell["score"] is not None]
        return {
            "total": {**measure(kept), **self.averages(measured)},
            "cells": cells,
        }

    def paired_scores(
        self, ours: Sequence[Record], dense: Sequence[Record]
    ) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
        """See the base class: the weighted means are the overall scores / 100."""
        common = {record["sample_id"] for record in ours} & {
            record["sample_id"] for record in dense
        }
        counts = Counter(name.rpartition("/")[0] for name in common)
        labels = {part.key: part.labels for part in self.parts() if part.key in counts}
        cells = list(labels.values())
        shares = {key: self.weight(labels[key], cells) / counts[key] for key in labels}

        def scores(records: Sequence[Record]) -> dict[str, float]:
            return {
                record["sample_id"]: record["score"] / 100
                for record in records
                if record["sample_id"] in common
            }

        weights = {name: shares[name.rpartition("/")[0]] for name in common}
        return scores(ours), scores(dense), weights


def measure(records: Sequence[Record]) -> dict[str, Any]:
    """Score, density and time of some records; accuracy too if they are right or wrong."""
    from experiments.statistics import wilson_interval

    if not records:
        return {"num_samples": 0, "score": None}
    numbers: dict[str, Any] = {
        "num_samples": len(records),
        "score": mean(record["score"] for record in records),
    }
    if all("correct" in record for record in records):
        num_correct = sum(record["correct"] for record in records)
        interval = wilson_interval(num_correct, len(records))
        numbers |= {
            "num_correct": num_correct,
            "accuracy": num_correct / len(records),
            "accuracy_low": interval.low,
            "accuracy_high": interval.high,
        }
    dense_calls: Counter[str] = Counter()
    for record in records:
        dense_calls.update(record["dense_calls"])
    return numbers | {
        "density": mean(record["density"] for record in records),
        **prefill_times(records),
        "num_input_tokens": sum(record["num_input_tokens"] for record in records),
        "num_output_tokens": sum(record["num_output_tokens"] for record in records),
        "num_truncated": sum(record["is_truncated"] for record in records),
        "num_sparse_layers": mean(record["num_sparse_layers"] for record in records),
        "sparse_calls": sum(record["sparse_calls"] for record in records),
        "dense_calls": dict(dense_calls),
    }


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values there are; None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def group(items: Sequence[_Item], key: Callable[[_Item], _Key]) -> dict[_Key, list[_Item]]:
    """Items by key, in their order."""
    groups: dict[_Key, list[_Item]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)

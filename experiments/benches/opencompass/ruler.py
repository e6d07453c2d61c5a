"""``bench=ruler``: generated needles, tracking, counting and questions at given lengths.

Source: Hsieh et al., "RULER", arXiv 2404.06654; the tasks, prompts and metrics are OpenCompass's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from experiments.benches.base import Context
from experiments.benches.opencompass.base import OpenCompassBench, group, mean, measure
from experiments.benches.opencompass.files import find_folder, require
from experiments.benches.opencompass.parts import Part
from experiments.store import Record

if TYPE_CHECKING:
    from experiments.settings.config import RunConfig

# Task to the file it needs; None: generated from word lists of a package.
TASKS: dict[str, str | None] = {
    "niah_single_1": None,
    "niah_single_2": "PaulGrahamEssays.jsonl",
    "niah_single_3": "PaulGrahamEssays.jsonl",
    "niah_multikey_1": "PaulGrahamEssays.jsonl",
    "niah_multikey_2": None,
    "niah_multikey_3": None,
    "niah_multivalue": "PaulGrahamEssays.jsonl",
    "niah_multiquery": "PaulGrahamEssays.jsonl",
    "vt": None,
    "fwe": None,
    "cwe": None,
    "qa_squad": "dev-v2.0.json",
    "qa_hotpotqa": "hotpotqa.json",
}
FREE_TASKS = tuple(task for task, file in TASKS.items() if file is None)
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
NUM_SAMPLES = 100
MAX_SAMPLES = 100_000
# OpenCompass's config files, and the list in each.
_STOCK = {kind: (f"ruler/ruler_{kind}_gen.py", f"{kind}_datasets") for kind in
          ("niah", "vt", "fwe", "cwe", "qa")}  # fmt: skip
ADVICE = (
    "They are those of OpenCompass's RULER (its data package, folder ruler/): "
    'PaulGrahamEssays.jsonl, one essay a line under "text"; dev-v2.0.json, SQuAD 2.0\'s '
    "development set; hotpotqa.json, HotpotQA's development set (distractor). Put them into DIR "
    "and give bench.data_dir=DIR. Without files run: bench.tasks=[" + ",".join(FREE_TASKS) + "]"
)


@dataclass(kw_only=True)
class Ruler(OpenCompassBench):
    """Average score of RULER's tasks at each length.

    Args:
        tasks: ``niah_*``, ``vt``, ``fwe``, ``cwe``, ``qa_*``.
        lengths: prompt, with the model's chat template, plus room for the answer, in tokens of its
            tokenizer. The room is ``max_out_len``, or what RULER itself allows if that is more.
        num_samples: samples per task and length (OpenCompass's 100).
        data_dir: folder with the files that seven of the tasks need.
        max_seq_len: prompt plus answer, in tokens; default: what the model takes.
        max_out_len: tokens of an answer. RULER's own largest by default; the paper's 2048 would
            cut 2000 tokens out of every prompt of the model's full length.
    """

    all_tasks: ClassVar[tuple[str, ...]] = tuple(TASKS)
    which_samples = ("limit", "tasks", "fraction", "lengths", "num_samples")

    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    lengths: list[int] = field(default_factory=lambda: list(LENGTHS))
    num_samples: int = NUM_SAMPLES
    max_out_len: int | None = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lengths or len(set(self.lengths)) < len(self.lengths) or min(self.lengths) < 1:
            raise ValueError(
                f"bench.lengths must name at least one length, each once, got {self.lengths}"
            )
        if self.max_seq_len is not None:
            self._check_lengths(self.max_seq_len, "bench.max_seq_len")
        if not 1 <= self.num_samples <= MAX_SAMPLES:
            raise ValueError(
                f"bench.num_samples must lie in [1, {MAX_SAMPLES}], got {self.num_samples}"
            )

    @property
    def is_partial(self) -> bool:
        """Also with fewer samples than OpenCompass's 100, or other lengths than the paper's."""
        is_standard = self.num_samples >= NUM_SAMPLES and set(self.lengths) == set(LENGTHS)
        return super().is_partial or not is_standard

    @override
    @classmethod
    def data_files(cls, folder: Path, tasks: Sequence[str]) -> list[str]:
        """See the base class."""
        return sorted({TASKS[task] for task in tasks} - {None})

    def prepare_data(self, cfg: RunConfig) -> None:
        """See the base class; also that no length is more than the model takes, if that is set."""
        if cfg.model.max_length is not None:
            self._check_lengths(cfg.model.max_length, "model.max_length")
        folder = Path("DIR")
        files = self.data_files(folder, self.tasks)
        if not files:
            self._folder = None
            return
        if self.data_dir:
            folder = find_folder(self.data_dir)
        require([folder / file for file in files], advice=ADVICE)
        self._folder = folder

    def run(self, context: Context) -> None:
        """See the base class; also that the model takes all lengths: a cut prompt lost needles."""
        if context.model is not None:
            self._check_lengths(context.model.max_length, "model.max_length")
        super().run(context)

    def _check_lengths(self, limit: int, name: str) -> None:
        if max(self.lengths) > limit:
            raise ValueError(
                f"bench.lengths has {max(self.lengths)}, but {name}={limit}; choose shorter "
                f"lengths, or raise {name} if you know better"
            )

    def parts(self) -> list[Part]:
        """See the base class."""
        return [
            Part(f"{task}-{length}", {"task": task, "length": length})
            for length in self.lengths
            for task in self.tasks
        ]

    @override
    def num_rows(self, part: Part) -> int:
        """See the base class."""
        return self.num_samples

    def dataset(self, part: Part, cfg: RunConfig) -> Any:
        """See the base class."""
        from experiments.benches.opencompass.ruler_data import CheckedRuler
        from experiments.models.load import resolve_path

        config = make_dataset(
            part.labels["task"],
            length=part.labels["length"],
            num_samples=self.num_used(part),
            tokenizer=resolve_path(cfg.model.path),
            folder=self._folder,
        )
        config["stock"], config["type"] = config["type"], CheckedRuler
        config["trust_remote_code"] = cfg.model.trust_remote_code
        config["max_out_len"], config["chat_options"] = self.max_out_len, self.chat_options
        return config

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """See the base class; also by length, a mean over the tasks."""
        results = super().summarise(records)
        lengths = group(results["cells"], lambda cell: cell["length"])
        by_length = group(self.without_failures(records), lambda record: record["length"])
        results["by_length"] = {
            str(length): {
                **measure(by_length.get(length, [])),
                "score": mean(cell["score"] for cell in lengths[length]),
            }
            for length in sorted(lengths)
        }
        return results


def suffix(length: int) -> str:
    """OpenCompass's name of a length: 4k, 128k."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def make_dataset(
    task: str, *, length: int, num_samples: int, tokenizer: str, folder: Path | None
) -> Any:
    """OpenCompass's own config of a task at a length, as its ``ruler_<length>_gen.py`` make it."""
    from experiments.benches.opencompass.harness import read_stock

    for config in read_stock(*_STOCK[task.partition("_")[0]]):
        if config["abbr"] != f"ruler_{task}":
            continue
        config["abbr"] = f"ruler_{task}_{suffix(length)}"
        config["num_samples"] = num_samples
        config["max_seq_length"] = length
        config["tokenizer_model"] = tokenizer
        if folder is not None and "base_path" in config:
            config["base_path"] = str(folder)
        if folder is not None and "path" in config:
            config["path"] = str(folder / TASKS[task])
        return config
    raise ValueError(f"OpenCompass has no RULER task {task!r}")

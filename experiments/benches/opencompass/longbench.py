"""``bench=longbench``: 21 tasks in English, Chinese and code, with OpenCompass's configs.

Source: Bai et al., "LongBench", arXiv 2308.14508; settings of the PBS paper, arXiv 2510.21270.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from experiments.benches.opencompass.base import OpenCompassBench, mean
from experiments.benches.opencompass.files import fetch, find_folder, read_rows, require
from experiments.benches.opencompass.parts import Part
from experiments.benches.opencompass.rows import columns_of
from experiments.store import Record

if TYPE_CHECKING:
    from experiments.settings.config import RunConfig

# OpenCompass's groups, which are those of LongBench and of the PBS paper's table.
CATEGORIES: dict[str, tuple[str, ...]] = {
    "single-document QA": ("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh"),
    "multi-document QA": ("hotpotqa", "2wikimqa", "musique", "dureader"),
    "summarization": ("gov_report", "qmsum", "multi_news", "vcsum"),
    "few-shot learning": ("trec", "triviaqa", "samsum", "lsht"),
    "synthetic": ("passage_count", "passage_retrieval_en", "passage_retrieval_zh"),
    "code": ("lcc", "repobench-p"),
}
TASKS = tuple(task for tasks in CATEGORIES.values() for task in tasks)
REPOSITORY, ARCHIVE = "THUDM/LongBench", "data.zip"
ADVICE = (
    f"Get {ARCHIVE} from https://huggingface.co/datasets/{REPOSITORY} and unpack it: "
    "bench.data_dir=DIR expects DIR/data/<task>.jsonl (or DIR/data.zip). Without bench.data_dir "
    "it is fetched from the hub."
)


@dataclass(kw_only=True)
class LongBench(OpenCompassBench):
    """Average score of LongBench's tasks, each with its own metric (F1, ROUGE-L, accuracy...).

    The overall average is the mean of the six category averages, as in OpenCompass's summary;
    the mean over the tasks is given beside it.

    Args:
        tasks: names as in LongBench.
        data_dir: folder with ``data/<task>.jsonl`` or ``data.zip``; default: the hub's.
        max_seq_len: prompt plus answer, in tokens, at most what the model takes.
        max_out_len: tokens of an answer; default: what OpenCompass's config of each task says
            (32 to 512). The paper's setting of 2048 had no effect, because those win.
    """

    all_tasks: ClassVar[tuple[str, ...]] = TASKS
    states_out_len: ClassVar[bool] = True

    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    max_seq_len: int | None = 131072
    max_out_len: int | None = None

    @classmethod
    def data_files(cls, folder: Path, tasks: Sequence[str]) -> list[str]:
        """See the base class: a file per task, or the archive for each where there are none."""
        names = [f"data/{task}.jsonl" for task in tasks]
        if (folder / ARCHIVE).is_file() and not any((folder / name).is_file() for name in names):
            return [ARCHIVE] * len(names)
        return names

    @override
    def prepare_data(self, cfg: RunConfig) -> None:
        """See the base class."""
        if self.data_dir is None:
            path = fetch(REPOSITORY, ARCHIVE, advice=ADVICE)
            self._paths = dict.fromkeys(self.tasks, path)
            return
        folder = find_folder(self.data_dir)
        files = self.data_files(folder, self.tasks)
        self._paths = {task: folder / name for task, name in zip(self.tasks, files, strict=True)}
        require(list(self._paths.values()), advice=ADVICE)

    def parts(self) -> list[Part]:
        """See the base class."""
        return [Part(task, {"task": task, "category": category_of(task)}) for task in self.tasks]

    def num_rows(self, part: Part) -> int:
        """See the base class."""
        path = self._paths[part.key]
        member = f"data/{part.key}.jsonl" if path.suffix == ".zip" else None
        return len(read_rows(path, columns_of(part.key), member))

    @override
    def dataset(self, part: Part, cfg: RunConfig) -> Any:
        """See the base class."""
        return make_dataset(part.key, self._paths[part.key])

    def averages(self, cells: Sequence[Record]) -> dict[str, Any]:
        """Category averages over the tasks there are, the mean of those, and that over tasks."""
        scores = {cell["task"]: cell["score"] for cell in cells if cell["score"] is not None}
        categories = {}
        for name, tasks in CATEGORIES.items():
            present = [task for task in tasks if task in scores]
            if present:
                categories[name] = {
                    "score": mean(scores[task] for task in present),
                    "tasks": present,
                    "is_complete": len(present) == len(tasks),
                }
        return {
            "score": mean(entry["score"] for entry in categories.values()),
            "task_average": mean(scores.values()),
            "by_category": categories,
        }

    def weight(self, labels: Record, cells: Sequence[Record]) -> float:
        """See the base class: every category counts the same, and every task in it."""
        present = {cell["task"] for cell in cells}
        categories = {category_of(task) for task in present}
        siblings = present & set(CATEGORIES[category_of(labels["task"])])
        return 1 / (len(categories) * len(siblings))


@cache
def category_of(task: str) -> str:
    """The category a task belongs to."""
    return next(name for name, tasks in CATEGORIES.items() if task in tasks)


def make_dataset(task: str, path: Path) -> Any:
    """OpenCompass's own config of a task, with our loader."""
    from experiments.benches.opencompass.harness import read_stock
    from experiments.benches.opencompass.loaders import LongBenchFile

    for config in read_stock("longbench/longbench.py", "longbench_datasets"):
        if config["name"] == task:
            config["type"], config["path"] = LongBenchFile, str(path)
            return config
    raise ValueError(f"OpenCompass has no LongBench task {task!r}")

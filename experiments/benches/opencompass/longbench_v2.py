"""``bench=longbench_v2``: 503 multiple-choice questions on long texts.

Source: Bai et al., "LongBench v2", arXiv 2412.15204; settings of the PBS paper, arXiv 2510.21270.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from experiments.benches.opencompass.base import OpenCompassBench, group, measure
from experiments.benches.opencompass.files import fetch, find_folder, read_rows, require
from experiments.benches.opencompass.parts import Part
from experiments.benches.opencompass.rows import COLUMNS, DIFFICULTIES, LENGTHS
from experiments.store import Record

if TYPE_CHECKING:
    from experiments.settings.config import RunConfig

REPOSITORY, FILE = "THUDM/LongBench-v2", "data.json"
ADVICE = (
    f"Get {FILE} from https://huggingface.co/datasets/{REPOSITORY}: bench.data_dir=DIR expects "
    f"DIR/{FILE}. Without bench.data_dir it is fetched from the hub."
)


@dataclass(kw_only=True)
class LongBenchV2(OpenCompassBench):
    """Accuracy on LongBench v2, also by difficulty and by class of length.

    Args:
        tasks: only one, ``longbench_v2``.
        data_dir: folder with ``data.json``; default: the hub's.
        max_seq_len: prompt plus answer, in tokens; default: what the model takes (the paper's
            128K for Llama and 400K for Qwen are the limits of those models' configs).
        max_out_len: tokens of an answer.
    """

    all_tasks: ClassVar[tuple[str, ...]] = ("longbench_v2",)

    tasks: list[str] = field(default_factory=lambda: ["longbench_v2"])
    max_out_len: int | None = 2048

    @override
    @classmethod
    def data_files(cls, folder: Path, tasks: Sequence[str]) -> list[str]:
        """See the base class."""
        return [FILE]

    @override
    def prepare_data(self, cfg: RunConfig) -> None:
        """See the base class."""
        if self.data_dir is None:
            self._path = fetch(REPOSITORY, FILE, advice=ADVICE)
            return
        self._path = find_folder(self.data_dir) / FILE
        require([self._path], advice=ADVICE)

    def parts(self) -> list[Part]:
        """See the base class."""
        return [Part("longbench_v2", {"task": "longbench_v2"})]

    @override
    def num_rows(self, part: Part) -> int:
        """See the base class."""
        return len(read_rows(self._path, COLUMNS))

    @override
    def dataset(self, part: Part, cfg: RunConfig) -> Any:
        """See the base class."""
        return make_dataset(self._path)

    def facts(self, sample: Record, score: float) -> Record:
        """See the base class."""
        return {
            "difficulty": sample["difficulty"],
            "length_class": sample["length"],
            "correct": score == 100,
        }

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """See the base class."""
        records = self.without_failures(records)
        by_difficulty = group(records, lambda record: record["difficulty"])
        by_length = group(records, lambda record: record["length_class"])
        cells = group(records, lambda record: (record["difficulty"], record["length_class"]))
        return {
            "total": measure(records),
            "by_difficulty": {
                name: measure(by_difficulty[name]) for name in DIFFICULTIES if name in by_difficulty
            },
            "by_length_class": {
                name: measure(by_length[name]) for name in LENGTHS if name in by_length
            },
            "cells": [
                {
                    "task": "longbench_v2",
                    "difficulty": difficulty,
                    "length_class": length,
                    **measure(part),
                }
                for (difficulty, length), part in cells.items()
            ],
        }


def make_dataset(path: Path) -> Any:
    """OpenCompass's own config, with our loader."""
    from experiments.benches.opencompass.harness import read_stock
    from experiments.benches.opencompass.loaders import LongBenchV2File

    (config,) = read_stock("longbenchv2/longbenchv2_gen.py", "LongBenchv2_datasets")
    config["type"], config["path"] = LongBenchV2File, str(path)
    return config

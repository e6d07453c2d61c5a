"""Data sets for OpenCompass from the benchmarks' own files. Imports OpenCompass.

The stock loaders need a loading script that datasets 4 refuses, or download by themselves, and
read LongBench v2 in quadratic time.
"""

from __future__ import annotations

from datasets import Dataset
from opencompass.datasets.base import BaseDataset
from opencompass.registry import LOAD_DATASET

from experiments.benches.opencompass.files import read_rows
from experiments.benches.opencompass.rows import CLASSIFICATION, COLUMNS, columns_of


@LOAD_DATASET.register_module()
class LongBenchFile(BaseDataset):
    """One LongBench task, from ``data/<task>.jsonl`` or the hub's ``data.zip``."""

    @staticmethod
    def load(path: str, name: str) -> Dataset:
        """Rows with the columns that the stock prompts and metrics use.

        Args:
            path: the task's JSON-lines file, or the zip archive of all tasks.
            name: the task.
        """
        member = f"data/{name}.jsonl" if path.endswith(".zip") else None
        rows = read_rows(path, columns_of(name), member)
        if name not in CLASSIFICATION:
            return Dataset.from_list(rows)
        return Dataset.from_list(
            [
                {
                    "input": row["input"],
                    "context": row["context"],
                    "all_labels": {"answers": row["answers"], "all_classes": row["all_classes"]},
                }
                for row in rows
            ]
        )


@LOAD_DATASET.register_module()
class LongBenchV2File(BaseDataset):
    """LongBench v2, from its one ``data.json``."""

    @staticmethod
    def load(path: str) -> Dataset:
        """Rows with the columns that the stock prompt and metric use.

        Args:
            path: the JSON file.
        """
        return Dataset.from_list(read_rows(path, COLUMNS))

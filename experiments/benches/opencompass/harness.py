"""Runs single OpenCompass tasks in this process, around one model. Imports OpenCompass.

OpenCompass's own command starts a process per task, exits 0 when all of them failed, and finds
earlier predictions by an abbreviation that knows nothing of the method. Here every run has its own
folder and abbreviation, and an error is an exception.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import datasets
import opencompass
from mmengine.config import Config, ConfigDict
from opencompass.models.base import BaseModel
from opencompass.openicl.icl_inferencer import icl_gen_inferencer
from opencompass.tasks import OpenICLEvalTask, OpenICLInferTask
from opencompass.utils import build_dataset_from_cfg, get_infer_output_path, get_logger

STOCK = Path(opencompass.__file__).parent / "configs" / "datasets"
# What a task's overall metric may be called, the first that is there counts.
METRICS = ("score", "accuracy", "exact_match", "rougeL", "rouge1", "f1")


def read_stock(path: str, key: str) -> list[ConfigDict]:
    """Data sets of a config that comes with OpenCompass.

    Args:
        path: below OpenCompass's folder of data set configs.
        key: the list's name in it.
    """
    return Config.fromfile(str(STOCK / path))[key]


class EvaluatedTask:
    """One data set, one model, one folder: infer, evaluate.

    Args:
        dataset: OpenCompass's config of the data set.
        abbr: the model's abbreviation; must name the run.
        work_dir: OpenCompass's files go there.
    """

    def __init__(self, dataset: ConfigDict, *, abbr: str, work_dir: Path) -> None:
        dataset = copy.deepcopy(ConfigDict(dataset))
        # Inference, evaluation and scoring share one data set: long texts are slow to make.
        built = build_dataset_from_cfg(dataset)
        dataset["type"] = lambda **_: built
        # It would make a folder icl_inference_output in the current one.
        dataset["infer_cfg"]["inferencer"]["output_json_filepath"] = str(work_dir / "predictions")
        self._abbr = abbr
        self._config = ConfigDict(
            models=[ConfigDict(abbr=abbr, type=BaseModel, batch_size=1)],
            datasets=[[dataset]],
            work_dir=str(work_dir),
        )

    def infer(self, model: BaseModel) -> None:
        """Let the model answer every sample, in order."""
        OpenICLInferTask(self._config).run(cur_model=model, cur_model_abbr=self._abbr)

    def evaluate(self) -> dict[str, float]:
        """OpenCompass's metrics of the whole data set.

        Raises:
            FileNotFoundError: without predictions.
        """
        OpenICLEvalTask(self._config).run()
        return json.loads(self._path("results").read_text())

    def predictions(self) -> list[str]:
        """The answers, in order, before post-processing."""
        answers = json.loads(self._path("predictions").read_text())
        return [answers[str(index)]["prediction"] for index in range(len(answers))]

    def remove_predictions(self) -> None:
        """Delete the file with the answers: it repeats every prompt, hundreds of MB in all."""
        self._path("predictions").unlink()

    def scorer(self) -> SampleScorer:
        """The same metric for single samples."""
        return SampleScorer(self._config)

    def _path(self, kind: str) -> Path:
        folder = os.path.join(self._config.work_dir, kind)
        path = get_infer_output_path(self._config.models[0], self._config.datasets[0][0], folder)
        return Path(path)


class SampleScorer(OpenICLEvalTask):
    """Scores single answers with OpenCompass's own post-processing and metric.

    The metrics used here are averages over samples, so the mean of these scores is the task's.
    """

    def __init__(self, config: ConfigDict) -> None:
        super().__init__(config)
        self.model_cfg, self.dataset_cfg = self.model_cfgs[0], self.dataset_cfgs[0][0]
        self.eval_cfg = self.dataset_cfg["eval_cfg"]
        self.output_column = self.dataset_cfg["reader_cfg"]["output_column"]
        self.samples = self._load_and_preprocess_test_data()

    def __len__(self) -> int:
        return len(self.samples)

    def gold(self, index: int) -> Any:
        """The reference of a sample."""
        return self.samples[index][self.output_column]

    def score(self, index: int, prediction: str) -> float:
        """Score of an answer, 0 to 100."""
        raw = [{"prediction": prediction, "gold": self.gold(index)}]
        result = self._evaluate_predictions(
            self._process_predictions([prediction]), self.samples.select([index]), raw
        )
        return overall(result)


def overall(metrics: Mapping[str, float]) -> float:
    """The one number among a task's metrics, 0 to 100.

    Raises:
        ValueError: none of the known ones is there.
    """
    for name in METRICS:
        if name in metrics:
            return float(metrics[name])
    raise ValueError(f"expected one of {', '.join(METRICS)} among the metrics, got {dict(metrics)}")


@contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Send what OpenCompass prints and logs to a file, and leave out its progress bars."""
    log.parent.mkdir(parents=True, exist_ok=True)
    loggers = [get_logger(), icl_gen_inferencer.logger]
    handlers, tqdm = [logger.handlers for logger in loggers], icl_gen_inferencer.tqdm
    had_bars = datasets.is_progress_bar_enabled()
    logging.getLogger("jieba").setLevel(logging.WARNING)
    with log.open("a") as file, redirect_stdout(file):
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s"))
        for logger in loggers:
            logger.handlers = [handler]
        icl_gen_inferencer.tqdm = _no_bar
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            for logger, old in zip(loggers, handlers, strict=True):
                logger.handlers = old
            icl_gen_inferencer.tqdm = tqdm
            if had_bars:
                datasets.enable_progress_bars()


def _no_bar(samples: Any, **_: Any) -> Any:
    return samples

"""``bench=ttft``: time to the first token of whole models, over lengths, beside dense attention."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from experiments.benches.base import Bench, Context
from experiments.benches.coverage.texts import text_files
from experiments.content import input_digest
from experiments.settings.config import ConfigError
from experiments.store import Record, RunStore
from experiments.timing.timing_report import (
    draw_speed_up,
    failures_of,
    lines_of,
    summarise_times,
    write_times,
)

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.models.load import LoadedModel

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TtftBench(Bench):
    """Prefill of whole prompts, timed up to the first token, interleaved with dense attention.

    With ``model.weights=random`` what a method selects means nothing: give densities.

    Args:
        lengths: of the prompts, in tokens.
        densities: null: what the method selects itself; else one exact density per length, for
            which the method still pays for its order and selection.
        texts: JSON or JSON lines with a text under "context" each, as in LongBench v2: cut, or
            repeated, to each length. Default: generated token ids.
        num_texts: texts to take turns over.
        dense: dense kernels to compare with; default those there are.
        seconds: of timed prefills of a length, all variants together.
        min_rounds: prefills of each variant at least.
        max_rounds: prefills of each variant at most.
    """

    times_dense: ClassVar[bool] = True

    lengths: list[int] = field(default_factory=lambda: [1024, 2048, 4096, 8192])
    densities: list[float] | None = None
    texts: str | None = None
    num_texts: int = 2
    dense: list[str] | None = None
    seconds: float = 20.0
    min_rounds: int = 5
    max_rounds: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lengths or min(self.lengths) < 2:
            raise ValueError(f"bench.lengths must be at least 2, got {self.lengths}")
        if self.densities is not None and len(self.densities) != len(self.lengths):
            raise ValueError(
                f"bench.densities needs one density per length, got {self.densities} for "
                f"{self.lengths}"
            )
        if self.num_texts < 1:
            raise ValueError(f"bench.num_texts must be at least 1, got {self.num_texts}")

    @classmethod
    def input_files(cls, settings: Mapping[str, Any]) -> dict[str, Path]:
        """See the base class."""
        return text_files("texts", settings["texts"])

    def run(self, context: Context) -> None:
        """See the base class."""
        from experiments.report.compare import describe
        from experiments.timing.dense_kernels import dense_kernels
        from experiments.timing.prefill_timing import measure_prefill
        from experiments.timing.stopwatch import Effort, measure_rates

        model, cfg = context.model, context.cfg
        assert model is not None
        if max(self.lengths) > model.max_length and cfg.model.weights == "pretrained":
            raise ConfigError(
                f"bench.lengths has {max(self.lengths)}, the model takes {model.max_length} tokens "
                "at most; choose shorter lengths, or raise model.max_length if you know better"
            )
        rates = measure_rates(model.device, model.model.dtype)
        context.announce(len(self.lengths))
        for index, length in enumerate(self.lengths):
            if f"N{length}" in context.done:
                continue
            started = time.perf_counter()
            prompts, facts = self._prompts(model, length, cfg.seed)
            record = measure_prefill(
                model.model,
                prompts,
                {describe(cfg.method): context.method},
                list(dense_kernels(model.device, self.dense)),
                effort=Effort(self.seconds, *self.rounds(is_shared=cfg.model.tp)),
                density=None if self.densities is None else self.densities[index],
                rates=rates,
            )
            record["input_digest"] = input_digest(*prompts)
            record["rates"] = rates.name
            record["seconds"] = time.perf_counter() - started
            name = {"sample_id": f"N{length}", "weights": cfg.model.weights}
            context.add({**name, **record, **facts})
        self.failures = failures_of(RunStore(context.folder).samples())

    def rounds(self, *, is_shared: bool) -> tuple[int, int]:
        """Fewest and most rounds; processes that share a model cannot each follow their clock."""
        return self.min_rounds, self.min_rounds if is_shared else self.max_rounds

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """See the base class; with the break-even length over every dense kernel."""
        return summarise_times(records)

    def draw(self, context: Context) -> list[Path]:
        """Speed-up against length; the table goes to the log and to ``times.csv``."""
        records = RunStore(context.folder).samples()
        write_times(records, context.folder / "times.csv")
        for line in lines_of(records):
            logger.info("%s", line)
        return draw_speed_up(records, context.folder / "speed_up.png")

    def _prompts(
        self, model: LoadedModel, length: int, seed: int
    ) -> tuple[list[Tensor], dict[str, int]]:
        """Token ids ``[1, length]``, and how many of the texts were cut or repeated for that."""
        from experiments.models.random_weights import random_ids

        if self.texts is None:
            vocab = model.model.config.get_text_config().vocab_size
            prompts = [
                random_ids(vocab, length, device=model.device, seed=seed + number)
                for number in range(self.num_texts)
            ]
            return prompts, {"num_prompts": len(prompts), "num_truncated": 0, "num_repeated": 0}
        if model.tokenizer is None:
            raise ConfigError("bench.texts needs a tokenizer; this model comes without one")
        texts = [
            model.tokenizer(text)["input_ids"]
            for text in read_texts(Path(self.texts), self.num_texts)
        ]
        facts = {
            "num_prompts": len(texts),
            "num_truncated": sum(len(ids) > length for ids in texts),
            "num_repeated": sum(len(ids) < length for ids in texts),
        }
        return [fit_to_length(ids, length).to(model.device) for ids in texts], facts


def read_texts(path: Path, count: int, *, setting: str = "bench.texts") -> list[str]:
    """The longest texts of a file, longest first.

    Args:
        path: JSON (a list) or JSON lines; each entry has a text under "context".
        count: how many.
        setting: what the user set to this path, for error messages.

    Raises:
        ConfigError: no such file, or an entry without a text.
    """
    if not path.is_file():
        raise ConfigError(f"{setting}={path}: no such file")
    try:
        content = path.read_text(encoding="utf-8")
        if content.lstrip().startswith("["):
            entries = json.loads(content)
        else:
            entries = [json.loads(line) for line in content.splitlines() if line.strip()]
        texts = [entry["context"] for entry in entries]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f'{setting}={path}: expected a text under "context" in every entry of a JSON list or '
            f"of JSON lines ({type(error).__name__}: {error})"
        ) from error
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ConfigError(f"{setting}={path} has no texts, or one that is empty or no text")
    return sorted(texts, key=len, reverse=True)[:count]


def fit_to_length(ids: Sequence[int], length: int) -> Tensor:
    """Token ids cut, or repeated from the start, to ``[1, length]``."""
    import torch

    repeats = -(-length // len(ids))
    return torch.tensor(list(ids) * repeats)[:length][None]

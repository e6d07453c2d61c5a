"""``bench=ttft``: time to the first token of whole models, over lengths, beside dense attention."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from experiments.benches.base import Context
from experiments.benches.text_files import read_texts, text_files
from experiments.benches.timed import PUBLISHED, TimedBench
from experiments.content import input_digest
from experiments.settings.config import ConfigError
from experiments.timing.timing_report import failures_of

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.models.load import LoadedModel

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TtftBench(TimedBench):
    """Prefill of whole prompts, timed up to the first token, interleaved with dense attention.

    With ``model.weights=random`` what a method selects means nothing: give densities.

    Args (further ones: :class:`TimedBench`; densities are one for each length):
        texts: JSON or JSON lines with a text under "context" each, as in LongBench v2: cut, or
            repeated, to each length. Default: generated token ids.
        num_texts: texts to take turns over.
    """

    small_form: ClassVar[str] = "model=tiny bench.lengths=[8192]"

    lengths: list[int] = field(default_factory=lambda: [1024, 2048, 4096, 8192])
    texts: str | None = None
    num_texts: int = 2
    seconds: float = 20.0
    max_rounds: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.densities not in (None, PUBLISHED) and len(self.densities) != len(self.lengths):
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
                self.methods(context),
                list(dense_kernels(model.device, self.dense)),
                effort=Effort(self.seconds, *self.rounds(is_shared=cfg.model.tp)),
                density=self.density_of(index),
                rates=rates,
            )
            record["input_digest"] = input_digest(*prompts)
            record["rates"] = rates.name
            record["seconds"] = time.perf_counter() - started
            name = {"sample_id": f"N{length}", "weights": cfg.model.weights}
            context.add({**name, **record, **facts})
        self.failures = failures_of(context.records())

    def rounds(self, *, is_shared: bool) -> tuple[int, int]:
        """Fewest and most rounds; processes that share a model cannot each follow their clock."""
        return self.min_rounds, self.min_rounds if is_shared else self.max_rounds

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


def fit_to_length(ids: Sequence[int], length: int) -> Tensor:
    """Token ids cut, or repeated from the start, to ``[1, length]``."""
    import torch

    repeats = -(-length // len(ids))
    return torch.tensor(list(ids) * repeats)[:length][None]

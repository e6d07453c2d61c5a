"""``bench=likelihood``: how far a sparse prefill moves a model's predictions of real text.

A window of text runs through the model once, dense and sparse; compared is what each position
predicts of the next token. No generation: damage shows that greedy answers hide.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from experiments.benches.base import Bench, Context
from experiments.benches.texts import (
    Window,
    held_out_windows,
    named_text,
    windows_of,
)
from experiments.content import input_digest
from experiments.metrics import Metric
from experiments.settings.config import ConfigError, RunConfig, digest
from experiments.store import Record

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.benches.likelihood_math import Comparison, DenseLikelihood
    from experiments.gate.coverage import CoverageProbe
    from experiments.models.load import LoadedModel

# Bands of position: methods that choose by the last queries shine in the last one alone.
NUM_BANDS = 4
ALL = "all"
# Positions that are named with their token, those of the largest KL.
NUM_WORST = 5


@dataclass(kw_only=True)
class LikelihoodBench(Bench):
    """NLL, KL(dense || sparse) and equal first choices, by window of text and band of position.

    Dense predictions are computed once for a model and a window, with the model's own attention,
    and kept beside the runs in ``dense/`` (:mod:`experiments.benches.likelihood_math`: the 256
    likeliest tokens of each position and all others together). KL is a lower bound, near in
    practice: what is joined has less than a few percent of the probability.

    Args:
        texts: files with running text (UTF-8), or names of ``experiments.tools.texts``.
        lengths: of a window, in tokens.
        windows: of each text and length, spread evenly over the first 80 % of the text; the rest is
            held out for ``match``.
        offset: tokens at the start of each text that are left out.
        coverage_rows: queries a call to measure coverage on, in a forward of its own; 0 leaves it
            out, null measures all.
        coverage_layers: layers to measure; default: first, middle and last.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("kl", "nats", higher_is_better=False, decimals=4, is_paired=False),
        Metric("nll_difference", "nats", higher_is_better=False, decimals=4, is_paired=False),
        Metric("top1_same", "%", decimals=1, is_paired=False),
        Metric("kl_p99", "nats", higher_is_better=False, interval=None, is_paired=False),
    )
    which_samples: ClassVar[tuple[str, ...]] = (
        *("limit", "texts", "lengths", "windows"),
        *("coverage_rows", "coverage_layers"),
    )

    texts: list[str] = field(default_factory=lambda: ["debian-handbook"])
    lengths: list[int] = field(default_factory=lambda: [2048])
    windows: int = 4
    offset: int = 0
    coverage_rows: int | None = 256
    coverage_layers: list[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("texts", "lengths"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"bench.{name} must name at least one, each once, got {values}")
        if min(self.lengths) < 2 * NUM_BANDS:
            raise ValueError(f"bench.lengths must be at least {2 * NUM_BANDS}, got {self.lengths}")
        if self.windows < 1 or self.offset < 0:
            raise ValueError(
                "bench.windows must be at least 1 and bench.offset not negative, got "
                f"{self.windows} and {self.offset}"
            )
        if self.coverage_rows is not None and self.coverage_rows < 0:
            raise ValueError(f"bench.coverage_rows must not be negative, got {self.coverage_rows}")

    @classmethod
    def input_files(cls, settings: Mapping[str, Any]) -> dict[str, Path]:
        """See the base class."""
        paths = [named_text(name) for name in settings["texts"]]
        return {
            f"texts/{number}-{path.name}": path
            for number, path in enumerate(paths)
            if path.is_file()
        }

    @override
    def prepare(self, cfg: RunConfig) -> None:
        """See the base class."""
        for name in self.texts:
            path = named_text(name)
            if not path.is_file():
                raise ConfigError(
                    f"bench.texts={name}: no such file; give a file with running text, or fetch a "
                    "book: python -m experiments.tools.texts fetch"
                )

    def run(self, context: Context) -> None:
        """See the base class."""
        from experiments.benches.likelihood_math import compare_to_dense
        from pbs.patch.huggingface import apply_patch_with_prefill, get_patch

        model = context.model
        assert model is not None
        if max(self.lengths) > model.max_length:
            raise ConfigError(
                f"bench.lengths has {max(self.lengths)}, the model takes {model.max_length} tokens "
                "at most; choose shorter lengths, or model.rope_factor=2 for twice as many"
            )
        check_head(model)
        found = [
            one
            for length in self.lengths
            for name in self.texts
            for one in windows_of(
                name, model.tokenizer, length=length, count=self.windows, offset=self.offset
            )
        ]
        found = found[: self.limit]
        context.announce(len(found))
        is_warm = False
        for window in found:
            if window.name in context.done:
                continue
            started = time.perf_counter()
            ids = window.ids.to(model.device)[None]
            dense = self._dense(context, model, window, ids)
            with apply_patch_with_prefill(model.model, context.method):
                patch = get_patch(model.model)
                if not is_warm:  # the first call compiles and tunes kernels
                    hidden_states(model, ids)
                    is_warm = True
                patch.reset()
                model.synchronise()
                begun = time.perf_counter()
                hidden = hidden_states(model, ids)
                model.synchronise()
                seconds = time.perf_counter() - begun
                report = patch.report()
                coverage = self._coverage(context, model, ids)
            compared = compare_to_dense(dense, hidden[:-1], ids[0, 1:], to_logits(model))
            record = {
                "sample_id": window.name,
                "text": window.text,
                "start": window.start,
                "length": len(window.ids),
                "input_digest": input_digest(window.ids),
                "is_truncated": False,
                **measure(compared, slice(None)),
                "nll": float(compared.nll.mean()),
                "dense_nll": float(dense.nll.mean()),
                "dense_rest": float(dense.log_rest.exp().mean()),
                "bands": [measure(compared, band) for band in bands(len(compared.kl))],
                "worst": worst(compared, ids[0], model),
                "density": report.density,
                "sparse_calls": report.sparse_calls,
                "dense_calls": report.dense_calls,
                "prefill_seconds": seconds,
                **coverage,
            }
            record["seconds"] = time.perf_counter() - started
            context.add(record)

    def _dense(
        self, context: Context, model: LoadedModel, window: Window, ids: Tensor
    ) -> DenseLikelihood:
        """What is kept of the dense run: from the disk, or computed now."""
        from experiments.benches.likelihood_math import keep_dense, load_dense, save_dense
        from experiments.settings.environment import device_name

        made_by = {
            "model": context.cfg.model_identity,
            "dtype": str(model.model.dtype),
            "device": device_name(),
            "window": input_digest(window.ids),
        }
        path = context.cfg.group / "dense" / f"{digest(made_by)}.safetensors"
        if path.is_file():
            return load_dense(path)
        found = keep_dense(hidden_states(model, ids)[:-1], ids[0, 1:], to_logits(model))
        save_dense(found, path)
        return load_dense(path)

    def _coverage(self, context: Context, model: LoadedModel, ids: Tensor) -> Record:
        """Coverage and its low percentiles over query rows, also by band."""
        if self.coverage_rows == 0:
            return {}
        probe = self.coverage_probe(model)
        context.method.recorder = probe
        try:
            hidden_states(model, ids)
        finally:
            context.method.recorder = None
        length = ids.shape[1]
        return {
            "coverage": probe.mean(),
            **_percentiles(probe.rows()),
            "coverage_bands": [
                _percentiles(rows) | {"coverage": float(rows.mean())}
                for rows in (probe.rows(one.start, one.stop) for one in bands(length))
            ],
            "coverage_heads": None,
            "coverage_rows": probe.num_rows_of(length),
        }

    def coverage_probe(self, model: LoadedModel) -> CoverageProbe:
        """See the base class."""
        from experiments.gate.coverage import CoverageProbe

        last = model.model.config.get_text_config().num_hidden_layers - 1
        layers = self.coverage_layers or sorted({0, last // 2, last})
        return CoverageProbe(layers, None, self.coverage_rows)

    @override
    def held_out(
        self,
        model: LoadedModel,
        *,
        lengths: Sequence[int] | None,
        num_prompts: int,
        seed: int,
    ) -> list[tuple[str, Tensor]]:
        """See the base class: windows of the last fifth of each text, in turns."""
        return [
            (window.name, window.ids.to(model.device)[None])
            for length in lengths or self.lengths
            for window in held_out_windows(
                self.texts, model.tokenizer, length=length, count=num_prompts
            )
        ]

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """See the base class; a cell for each length and band, "all" first."""
        lengths = sorted({record["length"] for record in records})
        cells = []
        for length in lengths:
            some = [record for record in records if record["length"] == length]
            cells.append({"length": length, "band": ALL, **self._measure_rows(some)})
            for index in range(NUM_BANDS):
                part = [_of_band(record, index) for record in some]
                band = {"length": length, "band": f"{index + 1} of {NUM_BANDS}"}
                cells.append({**band, **self._measure_rows(part)})
        by_length = {str(cell["length"]): cell for cell in cells if cell["band"] == ALL}
        return {"total": self._measure_rows(records), "by_length": by_length, "cells": cells}

    def _measure_rows(self, records: Sequence[Record]) -> Record:
        found = self._measure(records)
        for name in ("coverage_p1", "coverage_p5"):
            values = [record[name] for record in records if record.get(name) is not None]
            found[name] = sum(values) / len(values) if values else None
        return found


def bands(count: int) -> list[slice]:
    """First to last quarter of so many positions."""
    edges = [count * index // NUM_BANDS for index in range(NUM_BANDS + 1)]
    return [slice(*pair) for pair in pairwise(edges)]


def measure(compared: Comparison, rows: slice) -> Record:
    """The metrics of some positions of a window."""
    kl = compared.kl[rows].double()
    return {
        "kl": float(kl.mean()),
        "nll_difference": float(compared.nll_difference[rows].double().mean()),
        "top1_same": float(compared.is_same_choice[rows].double().mean()),
        "kl_p99": float(kl.quantile(0.99)),
    }


def worst(compared: Comparison, ids: Tensor, model: LoadedModel) -> list[Record]:
    """The positions of the largest KL, with the token there and the one that follows."""
    top = compared.kl.topk(min(NUM_WORST, len(compared.kl)))
    return [
        {
            "position": place,
            "kl": value,
            "token": model.tokenizer.decode([int(ids[place])]),
            "next": model.tokenizer.decode([int(ids[place + 1])]),
        }
        for value, place in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]


def hidden_states(model: LoadedModel, ids: Tensor) -> Tensor:
    """What the model's head reads, ``[N, H]``, from ids ``[1, N]``; no cache is kept."""
    import torch

    with torch.inference_mode():
        return model.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]


def to_logits(model: LoadedModel) -> Any:
    """From hidden states ``[n, H]`` to logits ``[n, V]``."""
    import torch

    head = model.model.get_output_embeddings()

    def apply(hidden: Tensor) -> Tensor:
        with torch.inference_mode():
            return head(hidden)

    return apply


def check_head(model: LoadedModel) -> None:
    """That the model's logits are its head's output, nothing after it.

    Raises:
        ConfigError: they are not; such models scale or cap them.
    """
    import torch

    if model.tokenizer is None:
        raise ConfigError("bench=likelihood reads text and needs a tokenizer; this model has none")
    head = model.model.get_output_embeddings()
    if head is None:
        raise ConfigError("bench=likelihood needs a causal language model; this one has no head")
    ids = torch.arange(8, device=model.device)[None] % model.model.config.vocab_size
    with torch.inference_mode():
        whole = model.model(input_ids=ids, use_cache=False).logits[0].float()
        parts = to_logits(model)(hidden_states(model, ids)).float()
        is_alike = whole.shape == parts.shape
        tolerance = 1e-3 if model.model.dtype == torch.float32 else 0.05
        if is_alike:
            is_alike = bool((whole - parts).abs().max() <= tolerance * whole.abs().max())
    if not is_alike:
        raise ConfigError(
            f"{type(model.model).__name__} changes what its head computes (a cap or a scale of the "
            "logits), which bench=likelihood does not know of"
        )


def _percentiles(rows: Tensor) -> Record:
    return {f"coverage_p{p}": float(rows.quantile(p / 100)) for p in (1, 5)}


def _of_band(record: Record, index: int) -> Record:
    """A record with the numbers of one band."""
    found = {**record, **record["bands"][index]}
    if record.get("coverage_bands"):
        found |= record["coverage_bands"][index]
    found.pop("prefill_seconds", None)
    return found

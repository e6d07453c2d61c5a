"""``bench=needle``: generated questions over a grid of lengths and depths, exact match."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.benches import needle_grid
from experiments.benches.base import Bench, Context
from experiments.benches.texts import named_text, read_text
from experiments.content import input_digest
from experiments.metrics import ACCURACY, Metric, summarise_metrics
from experiments.run_environments import prefill_times
from experiments.store import Record
from pbs.registry import unknown

if TYPE_CHECKING:
    import torch

    from experiments.benches.needle_tasks import NeedleSample
    from experiments.gate.coverage import CoverageProbe
    from experiments.models.load import LoadedModel
    from pbs.methods import AttentionMethod

NOT_FINITE = (
    "the model's logits are NaN or infinite, so that its answer means nothing: the checkpoint or "
    "model.config is damaged, or model.dtype cannot hold its activations; try model.dtype=float32"
)
ANSWER_NLL = Metric("answer_nll", "nats", higher_is_better=False, decimals=3)
# Indices of measured samples are below.
HELD_OUT_INDEX = 1_000_000


def _all_tasks() -> list[str]:
    from experiments.benches.needle_tasks import TASKS

    return list(TASKS)


@dataclass(kw_only=True)
class NeedleBench(Bench):
    """Retrieval from generated text: accuracy, density, coverage, time to first token.

    Args:
        tasks: which of ``experiments.benches.needle_tasks.TASKS``.
        lengths: prompt plus answer, in tokens of the model's tokenizer.
        depths: where in the text the asked needle stands, from 0 (start) to 1 (end).
        num_samples: samples per task, length and depth.
        coverage_every: coverage is measured, in an untimed prefill of its own, on one of this many
            samples of a task and length; 0 never. Which:
            :func:`experiments.benches.needle_grid.share`. Prompts differ: MeanPooling's coverage
            at 2048 tokens is 0.968 over 25 samples, and 0.954 over one of 5.
        coverage_layers: layers to measure; default: first, middle and last.
        coverage_heads: query heads to measure; default: all.
        coverage_rows: queries a call to measure coverage on; null for all.
        haystack: a file with running text (UTF-8), or the name of a book of
            ``experiments.tools.texts``, instead of generated sentences.
        chat: write the tokenizer's chat template around the prompt, if it has one; false asks a
            model as it was pretrained.

    Beside the answer, which is right or wrong, the right answer's NLL is measured, a token's mean,
    on the same filled cache: it shows damage where two runs answer alike.
    """

    metrics = (ACCURACY, ANSWER_NLL)
    which_samples = (
        *("limit", "tasks", "lengths", "depths", "num_samples"),
        *("coverage_every", "coverage_layers", "coverage_heads", "coverage_rows"),
    )

    tasks: list[str] = field(default_factory=_all_tasks)
    lengths: list[int] = field(default_factory=lambda: [1024, 4096, 8192])
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    num_samples: int = 1
    coverage_every: int = 1
    coverage_layers: list[int] | None = None
    coverage_heads: list[int] | None = None
    coverage_rows: int | None = 256
    haystack: str | None = None
    chat: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        valid = _all_tasks()
        for task in self.tasks:
            if task not in valid:
                raise ValueError(unknown("task of bench needle:", task, valid))
        for name in ("tasks", "lengths", "depths"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"bench.{name} must name at least one, each once, got {values}")
        self._check_coverage()
        if min(self.depths) < 0 or max(self.depths) > 1:
            raise ValueError(f"bench.depths must lie in [0, 1], got {self.depths}")
        if self.num_samples > HELD_OUT_INDEX:
            raise ValueError(
                f"bench.num_samples must be at most {HELD_OUT_INDEX}, got {self.num_samples}"
            )
        if self.num_samples < 1 or self.coverage_every < 0 or min(self.lengths) < 1:
            raise ValueError(
                "bench.num_samples and bench.lengths must be positive, bench.coverage_every not "
                f"negative, got {self.num_samples}, {self.lengths} and {self.coverage_every}"
            )

    def _check_coverage(self) -> None:
        for name in ("coverage_layers", "coverage_heads"):
            chosen = getattr(self, name)
            if chosen is not None and (not chosen or min(chosen) < 0):
                raise ValueError(
                    f"bench.{name} must name at least one, from 0, or be null for the default, got "
                    f"{chosen}"
                )
        if self.coverage_rows is not None and self.coverage_rows < 1:
            raise ValueError(
                "bench.coverage_rows must be at least 1, or null for all rows, got "
                f"{self.coverage_rows}; bench.coverage_every=0 measures no coverage"
            )

    @classmethod
    def input_files(cls, settings: Mapping[str, Any]) -> dict[str, Path]:
        """See the base class."""
        name = settings.get("haystack")
        path = None if name is None else named_text(name)
        return {"haystack": path} if path is not None and path.is_file() else {}

    def sentences(self) -> list[str] | None:
        """Of the haystack; None if they are generated.

        Raises:
            ConfigError: no such text, or none that can be read.
        """
        from experiments.benches.needle_tasks import split_sentences

        return None if self.haystack is None else split_sentences(read_text(self.haystack))

    def grid(self) -> list[needle_grid.Cell]:
        """Every sample in the order they run; with ``limit`` the first of each task."""
        cells = needle_grid.grid(self.tasks, self.lengths, self.depths, self.num_samples)
        return needle_grid.first(cells, self.limit)

    def run(self, context: Context) -> None:
        """See the base class. One prefill before the first measured one is warm-up."""
        from experiments.benches.needle_tasks import make_sample
        from pbs.patch.huggingface import apply_patch_with_prefill

        model, method = context.model, context.method
        if max(self.lengths) > model.max_length:
            raise ValueError(
                f"bench.lengths has {max(self.lengths)}, the model takes {model.max_length} tokens "
                "at most; choose shorter lengths, or raise model.max_length if you know better"
            )
        self._check_exist(model)
        grid = self.grid()
        context.announce(len(grid))
        covered = needle_grid.share(grid, self.coverage_every)
        sentences = self.sentences()
        is_warm = False
        with apply_patch_with_prefill(model.model, method):
            for cell in grid:
                task, length, depth, index = cell
                started = time.perf_counter()
                sample = make_sample(
                    task,
                    length=length,
                    depth=depth,
                    index=index,
                    seed=context.cfg.seed,
                    tokenizer=model.tokenizer,
                    haystack=sentences,
                    is_chat=self.chat,
                )
                if sample.sample_id in context.done:
                    continue
                inputs = encode_sample(model, sample)
                if not is_warm:
                    prefill(model, inputs)
                    is_warm = True
                record = answer(model, sample, inputs)
                if cell in covered:
                    record |= sample_coverage(model, method, inputs, self.coverage_probe(model))
                record["seconds"] = time.perf_counter() - started
                context.add(record)

    def _check_exist(self, model: LoadedModel) -> None:
        """Layers and heads to measure coverage on must be the model's."""
        config = model.model.config.get_text_config()
        counts = {
            "coverage_layers": config.num_hidden_layers,
            "coverage_heads": config.num_attention_heads,
        }
        for name, count in counts.items():
            chosen = getattr(self, name)
            if chosen is not None and max(chosen) >= count:
                raise ValueError(f"bench.{name} must lie in [0, {count - 1}], got {chosen}")

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """See the base class; also by task and by length."""
        by = _group(records, lambda record: (record["task"], record["length"]))
        by_task = _group(records, lambda record: record["task"])
        by_length = _group(records, lambda record: record["length"])
        return {
            "total": measure(records),
            "by_task": {task: measure(part) for task, part in by_task.items()},
            "by_length": {str(length): measure(by_length[length]) for length in sorted(by_length)},
            "cells": [
                {"task": task, "length": length, **measure(part)}
                for (task, length), part in by.items()
            ],
        }

    def held_out(
        self,
        model: LoadedModel,
        *,
        lengths: Sequence[int] | None,
        num_prompts: int,
        seed: int,
    ) -> list[tuple[str, torch.Tensor]]:
        """See the base class. Pairs of task and depth take turns, over all lengths.

        See :func:`experiments.benches.needle_grid.pair`; the indices are never measured.
        """
        from experiments.benches.needle_tasks import make_sample

        prompts, sentences = [], self.sentences()
        for length in lengths or self.lengths:
            for _ in range(num_prompts):
                number = len(prompts)
                task, depth = needle_grid.pair(self.tasks, self.depths, number)
                sample = make_sample(
                    task,
                    length=length,
                    depth=depth,
                    index=HELD_OUT_INDEX + number,
                    seed=seed,
                    tokenizer=model.tokenizer,
                    haystack=sentences,
                    is_chat=self.chat,
                )
                prompts.append((sample.sample_id, encode_sample(model, sample)))
        return prompts

    def coverage_probe(self, model: LoadedModel) -> CoverageProbe:
        """See the base class."""
        from experiments.gate.coverage import CoverageProbe

        last = num_layers(model) - 1
        layers = self.coverage_layers or sorted({0, last // 2, last})
        return CoverageProbe(layers, self.coverage_heads, self.coverage_rows)


def encode_sample(model: LoadedModel, sample: NeedleSample) -> torch.Tensor:
    """Token ids ``[1, N]`` on the model's device."""
    import torch

    from experiments.benches.needle_tasks import encode

    return torch.tensor([encode(sample, model.tokenizer)], device=model.device)


def answer(model: LoadedModel, sample: NeedleSample, inputs: torch.Tensor) -> Record:
    """Prefill the patched model, timed up to the first token, then write the rest of the answer."""
    from experiments.benches.needle_tasks import encode_answer, is_correct
    from pbs.patch.huggingface import get_patch

    patch = get_patch(model.model)
    patch.reset()
    model.synchronise()
    started = time.perf_counter()
    logits, cache = prefill(model, inputs)
    first = int(logits.argmax())
    model.synchronise()
    prefill_seconds = time.perf_counter() - started
    report = patch.report()
    tokens = decode(model, first, cache, num_tokens=sample.max_new_tokens)
    completion = model.tokenizer.decode(tokens, skip_special_tokens=True)
    nll = answer_nll(model, encode_answer(sample, model.tokenizer), logits, cache, inputs.shape[1])
    return {
        "sample_id": sample.sample_id,
        "task": sample.task,
        "length": sample.length,
        "depth": sample.depth,
        "num_input_tokens": inputs.shape[1],
        "input_digest": input_digest(inputs),
        "num_output_tokens": len(tokens),
        "is_truncated": False,
        "completion": completion,
        "answers": list(sample.answers),
        "correct": is_correct(sample, completion),
        "answer_nll": nll,
        "prefill_seconds": prefill_seconds,
        "density": report.density,
        "layer_density": [layer.density for layer in report.layers],
        "sparse_calls": report.sparse_calls,
        "dense_calls": report.dense_calls,
    }


def sample_coverage(
    model: LoadedModel, method: AttentionMethod, inputs: torch.Tensor, probe: CoverageProbe
) -> Record:
    """Coverage of the prompt and on what it was measured, in an untimed prefill of its own."""
    method.recorder = probe
    try:
        prefill(model, inputs)
    finally:
        method.recorder = None
    return {
        "coverage": probe.mean(),
        "layer_coverage": probe.per_layer(),
        "coverage_heads": probe.heads,
        "coverage_rows": probe.num_rows_of(inputs.shape[1]),
    }


def prefill(model: LoadedModel, inputs: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Logits ``[V]`` of the answer's first token and the filled cache, from ids ``[1, N]``.

    Raises:
        ValueError: the model computes NaN or infinity, whose largest entry is no answer.
    """
    import torch

    with torch.inference_mode():
        out = model.model(input_ids=inputs, use_cache=True, logits_to_keep=1)
        logits = out.logits[0, -1]
        if not logits.max().isfinite():  # NaN counts as the largest
            raise ValueError(NOT_FINITE)
        return logits, out.past_key_values


def answer_nll(
    model: LoadedModel, ids: Sequence[int], logits: torch.Tensor, cache: Any, length: int
) -> float | None:
    """Mean NLL, nats a token, of a given answer after a prompt.

    Args:
        model: patched or not: so few tokens on a filled cache are a decoding step.
        ids: of the answer.
        logits: ``[V]`` of its first token.
        cache: filled by the prompt, and perhaps by an answer, which is cut off.
        length: of the prompt.

    Returns:
        None for caches that cannot be cut back, such as those of sliding windows.
    """
    import torch

    if len(ids) > 1:
        try:
            extra = cache.get_seq_length() - length
            if extra:
                cache.crop(-extra)
        except (AttributeError, NotImplementedError, ValueError):
            return None
    with torch.inference_mode():
        rows = [logits[None]]
        if len(ids) > 1:
            inputs = torch.tensor([ids[:-1]], device=model.device)
            rows.append(model.model(input_ids=inputs, past_key_values=cache).logits[0])
        log_probs = torch.cat(rows).float().log_softmax(-1)
        targets = torch.tensor(ids, device=log_probs.device)
        return float(-log_probs.gather(-1, targets[:, None]).mean())


def decode(model: LoadedModel, first: int, cache: Any, *, num_tokens: int) -> list[int]:
    """Greedy answer of at most ``num_tokens``, beginning with ``first``, on a filled cache."""
    import torch

    ends = model.model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    tokens = [first]
    with torch.inference_mode():
        while len(tokens) < num_tokens and tokens[-1] not in ends:
            inputs = torch.tensor([tokens[-1:]], device=model.device)
            out = model.model(input_ids=inputs, past_key_values=cache, use_cache=True)
            tokens.append(int(out.logits[0, -1].argmax()))
    return tokens


def num_layers(model: LoadedModel) -> int:
    """Decoder layers of the model."""
    return model.model.config.get_text_config().num_hidden_layers


def measure(records: Sequence[Record]) -> dict[str, Any]:
    """Accuracy, density, coverage and time of some records."""
    from experiments.notes import coverage_facts
    from experiments.statistics import wilson_interval

    if not records:
        return {"num_samples": 0}
    num_correct = sum(record["correct"] for record in records)
    interval = wilson_interval(num_correct, len(records))
    dense_calls: Counter[str] = Counter()
    for record in records:
        dense_calls.update(record["dense_calls"])
    return {
        "num_samples": len(records),
        "num_correct": num_correct,
        "accuracy": num_correct / len(records),
        "accuracy_low": interval.low,
        "accuracy_high": interval.high,
        **summarise_metrics((ANSWER_NLL,), records),
        "density": _mean(record["density"] for record in records),
        "coverage": _mean(record.get("coverage") for record in records),
        **coverage_facts(records),
        **prefill_times(records),
        "num_truncated": sum(record["is_truncated"] for record in records),
        "sparse_calls": sum(record["sparse_calls"] for record in records),
        "dense_calls": dict(dense_calls),
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _group(records: Sequence[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    groups: dict[Any, list[Record]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return dict(groups)

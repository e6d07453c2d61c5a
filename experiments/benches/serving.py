"""``bench=serving``: a vLLM server under load: times to the first token, throughput, answers."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import starmap
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from experiments.benches import needle_grid
from experiments.benches.base import Bench, Context
from experiments.content import ROOT, input_digest
from experiments.metrics import ACCURACY, Metric
from experiments.settings.config import ConfigError, RunConfig, parameters
from experiments.store import Record

if TYPE_CHECKING:
    from experiments.benches.needle_tasks import NeedleSample
    from experiments.benches.vllm_server import Answer, VllmServer

# vLLM as it is.
STOCK = "flash"


@dataclass(kw_only=True)
class ServingBench(Bench):
    """Needle questions sent to a server at a given rate; ``method=flash`` is vLLM as it is.

    Runs of two methods ask the same questions and are compared question by question. All that a run
    has not answered yet are sent again, at the same rate, after one other question of each length
    that is not timed: the first compiles kernels. With ``model.weights=random`` the server
    draws weights of the model's shape: for times alone, and what a method selects means nothing.

    Args:
        url: of a server that runs already, such as http://127.0.0.1:8000, with the method's
            settings; null starts one on loopback and ends it afterwards.
        python: of an environment with vLLM and this project (``make test-vllm`` makes one), for
            servers that are started.
        options: of a server that is started: ``{max_model_len: 16384, enforce_eager: true}``.
        rate: requests a second; null sends all at once.
        max_tokens: of an answer.
        tasks: as in ``bench=needle``.
        lengths: as in ``bench=needle``.
        depths: as in ``bench=needle``.
        num_samples: as in ``bench=needle``.
    """

    needs_model: ClassVar[bool] = False
    metrics: ClassVar[tuple[Metric, ...]] = (ACCURACY,)
    which_samples: ClassVar[tuple[str, ...]] = (
        *("limit", "tasks", "lengths", "depths", "num_samples"),
        *("url", "python"),
    )
    cells_by: ClassVar[tuple[str, ...]] = ("length",)

    url: str | None = None
    python: str = ".venv-vllm/bin/python"
    options: dict[str, Any] = field(default_factory=dict)
    rate: float | None = None
    max_tokens: int = 8
    tasks: list[str] = field(default_factory=lambda: ["single", "multi_key"])
    lengths: list[int] = field(default_factory=lambda: [1024, 4096])
    depths: list[float] = field(default_factory=lambda: [0.0, 0.5, 1.0])
    num_samples: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        from experiments.benches.needle import NeedleBench

        NeedleBench(
            tasks=self.tasks,
            lengths=self.lengths,
            depths=self.depths,
            num_samples=self.num_samples,
        )
        if self.rate is not None and not self.rate > 0:
            raise ValueError(f"bench.rate must be positive, or null, got {self.rate}")
        if self.max_tokens < 1:
            raise ValueError(f"bench.max_tokens must be at least 1, got {self.max_tokens}")

    @classmethod
    @override
    def uses_model(cls, settings: Any) -> bool:
        """The server loads it, this process does not."""
        return True

    @override
    def prepare(self, cfg: RunConfig) -> None:
        """See the base class."""
        from experiments.benches.vllm_server import VllmServer

        if self.url is None:
            if shutil.which(self.python) is None:
                raise ConfigError(
                    f"bench.python={self.python}: no such program; it is an environment with vLLM "
                    "(make test-vllm makes .venv-vllm), or give bench.url of a running server"
                )
        elif not VllmServer(self.url).is_up():
            raise ConfigError(f"bench.url={self.url}: no server answers there")

    @override
    def run(self, context: Context) -> None:
        """See the base class."""
        from transformers import AutoTokenizer

        from experiments.benches.needle_tasks import encode, make_sample
        from experiments.models.load import resolve_path

        path = resolve_path(context.cfg.model.source)
        is_random = context.cfg.model.weights == "random"
        words = str(ROOT / "experiments" / "tiny") if is_random else path
        tokenizer = AutoTokenizer.from_pretrained(words)
        grid = needle_grid.grid(self.tasks, self.lengths, self.depths, self.num_samples)
        grid = needle_grid.first(grid, self.limit)
        context.announce(len(grid))

        def question(
            task: str, length: int, depth: float, index: int
        ) -> tuple[NeedleSample, list[int]]:
            sample = make_sample(
                task,
                length=length,
                depth=depth,
                index=index,
                seed=context.cfg.seed,
                tokenizer=tokenizer,
            )
            return sample, [int(token) for token in encode(sample, tokenizer)]

        asked = [pair for pair in starmap(question, grid) if pair[0].sample_id not in context.done]
        if not asked:
            return
        drawn = {"load_format": "dummy", "tokenizer": words} if is_random else {}
        with self._server(context, path, drawn) as server:
            model = server.model()
            for length in {sample.length for sample, _ in asked}:  # kernels are compiled
                _, ids = question(self.tasks[0], length, self.depths[0], self.num_samples)
                server.complete(model, ids, max_tokens=self.max_tokens)
            before = server.tiles()
            began = time.perf_counter()
            answers = list(self._ask(server, model, asked))
            seconds = time.perf_counter() - began
            time.sleep(1)  # workers write their counts twice a second
            tiles, causal = (after - x for after, x in zip(server.tiles(), before, strict=True))
        if context.cfg.method["name"] != STOCK and not causal:
            raise RuntimeError(
                "the server computed no prompt by pbs: is the plug-in installed there, with these "
                "settings, and are the prompts as long as min_keys? See its log"
            )
        load = {
            "load_seconds": seconds,
            "load_tokens": sum(len(ids) for _, ids in asked),
            "density": tiles / causal if causal else 1.0,
        }
        for (sample, ids), answer in zip(asked, answers, strict=True):
            record = {**_record(sample, ids, answer), **load}
            if is_random:
                record |= {"correct": None, "accuracy": None}
            context.add(record)

    @contextmanager
    def _server(
        self, context: Context, path: str, drawn: Mapping[str, Any]
    ) -> Iterator[VllmServer]:
        from experiments.benches.vllm_server import VllmServer, command, free_port, started
        from experiments.models.load import resolve_device

        if self.url is not None:
            yield VllmServer(self.url)
            return
        method, port = context.cfg.method, free_port()
        settings = None
        if method["name"] != STOCK:
            settings = {"method": method["name"], **parameters(method)}
        is_gpu = resolve_device("auto", "bench.device").type == "cuda"
        words = command(
            self.python,
            path,
            port,
            settings=settings,
            backend="CUSTOM" if settings is not None and is_gpu else None,
            options={**drawn, **self.options},
        )
        with started(words, port, context.folder / "server.log") as server:
            yield server

    def _ask(
        self, server: VllmServer, model: str, asked: Sequence[tuple[NeedleSample, list[int]]]
    ) -> Iterator[Answer]:
        """Answers in the order of the questions, which are sent when their time has come."""
        began = time.perf_counter()

        def ask(number: int) -> Answer:
            if self.rate is not None:
                time.sleep(max(0.0, began + number / self.rate - time.perf_counter()))
            return server.complete(model, asked[number][1], max_tokens=self.max_tokens)

        with ThreadPoolExecutor(len(asked)) as pool:
            yield from pool.map(ask, range(len(asked)))

    @override
    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """See the base class; with the slowest first tokens and the tokens computed a second."""
        found = super().summarise(records)
        found["total"] |= _load(records)
        for cell in found["cells"]:
            cell |= _slowest([one for one in records if one["length"] == cell["length"]])
        return found


def _record(sample: NeedleSample, ids: list[int], answer: Answer) -> Record:
    import torch

    from experiments.benches.needle_tasks import is_correct

    is_right = is_correct(sample, answer.text)
    return {
        "sample_id": sample.sample_id,
        "task": sample.task,
        "length": sample.length,
        "depth": sample.depth,
        "num_input_tokens": len(ids),
        "input_digest": input_digest(torch.tensor([ids])),
        "num_output_tokens": answer.num_tokens,
        "is_truncated": False,
        "completion": answer.text,
        "answers": list(sample.answers),
        "correct": is_right,
        "accuracy": float(is_right),
        "prefill_seconds": answer.first_token,
        "seconds": answer.total,
    }


def _slowest(records: Sequence[Record]) -> dict[str, float]:
    import numpy as np

    times = [one["prefill_seconds"] for one in records]
    return {"first_token_p99": float(np.quantile(times, 0.99))}


def _load(records: Sequence[Record]) -> dict[str, float]:
    """Of all loads: a resumed run has several."""
    if not records:
        return {}
    loads = {(one["load_seconds"], one["load_tokens"]) for one in records}
    seconds, tokens = (sum(values) for values in zip(*loads, strict=True))
    return {"tokens_per_second": tokens / seconds, **_slowest(records)}

"""Measures time and stages: interleaved variants, every sample kept, failures recorded.

Importable without hydra and wandb, as a machine with a GPU may have neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from experiments.device_memory import is_out_of_memory, release_memory
from experiments.speed.controlled_density import UnreachableDensityError
from experiments.speed.cost_model import Rates, known_rates
from experiments.statistics import quantiles
from pbs.methods.base import AttentionMethod, CallRecord
from pbs.ops.stages import StageTimer, stage

# Written before every timed call on a GPU: its second-level cache (50 MB on an H100) then holds
# nothing of the inputs.
FLUSH_BYTES = 256 << 20
# Clock cycles for which a device is held: 4 ms at 2 GHz, longer than any method launches kernels.
HOLD_CYCLES = 8_000_000
# Seconds of a round from which on warm-up would cost more than it tells.
LONG_ROUND = 2.0


def _variant_errors() -> tuple[type[Exception], ...]:
    """What a kernel that does not work raises; Triton has errors of its own."""
    errors: tuple[type[Exception], ...] = (RuntimeError, ValueError, ImportError, MemoryError)
    if find_spec("triton") is not None:
        errors += (import_module("triton.errors").TritonError,)
    return errors


# A variant that raises one of these has no time; the others go on.
VARIANT_ERRORS = _variant_errors()


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one variant, in the order they were made.

    Attributes:
        samples_ms: what each call took.
        host_samples_ms: how long the host was busy launching each of them; empty where the call is
            the host's own work.
    """

    samples_ms: tuple[float, ...]
    host_samples_ms: tuple[float, ...] = ()

    @property
    def median_ms(self) -> float:
        """Middle of the samples."""
        return quantiles(self.samples_ms).median

    def to_dict(self) -> dict[str, Any]:
        """Median, 20th and 80th percentile, and every sample; the host's median."""
        summary = quantiles(self.samples_ms)
        hosts = self.host_samples_ms
        return {
            "host_ms": quantiles(hosts).median if hosts else None,
            "median_ms": summary.median,
            "p20_ms": summary.p20,
            "p80_ms": summary.p80,
            "samples_ms": list(self.samples_ms),
        }


@dataclass(frozen=True)
class Failure:
    """Why a variant has no time.

    Attributes:
        kind: "out of memory"; "does not fit", known before trying; "incorrect"; "unavailable", a
            kernel that is not there or refuses; "error"; "skipped".
        message: the first line of the error.
    """

    kind: str
    message: str

    @classmethod
    def of(cls, error: Exception, kind: str = "out of memory") -> Failure:
        """From an exception."""
        return cls(kind, str(error).strip().split("\n")[0][:300])

    @classmethod
    def of_variant(cls, error: Exception, *, is_dense: bool) -> Failure:
        """From what a variant raised; a dense kernel refuses a shape by any kind of error."""
        is_refusal = isinstance(error, NotImplementedError | UnreachableDensityError)
        kind = "unavailable" if is_dense or is_refusal else "error"
        return cls.of(error, "out of memory" if is_out_of_memory(error) else kind)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; ``median_ms`` is None, so that tables show a gap."""
        return {"median_ms": None, "failure": self.kind, "message": self.message}


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Args:
        seconds: of timed calls together; rounds are made to fit, within the bounds.
        min_rounds: calls of each variant at least.
        max_rounds: calls of each variant at most.
    """

    seconds: float = 10.0
    min_rounds: int = 5
    max_rounds: int = 50

    def __post_init__(self) -> None:
        if self.seconds <= 0 or not 1 <= self.min_rounds <= self.max_rounds:
            raise ValueError(
                "expected seconds > 0 and 1 <= min_rounds <= max_rounds, got "
                f"{self.seconds}, {self.min_rounds} and {self.max_rounds}"
            )

    def num_rounds(self, seconds_per_round: float) -> int:
        """Rounds that fit."""
        fitting = int(self.seconds / max(seconds_per_round, 1e-9))
        return max(self.min_rounds, min(self.max_rounds, fitting))


class Stopwatch:
    """Times single calls on one device.

    Args:
        device: where the work runs.
        holds: on a GPU, let it wait before the call until the host has launched all of it, as in a
            model whose earlier layers still run. The time is then the device's own; how long the
            host takes is in ``host_ms``. Without it a short call is as slow as its launches.
    """

    def __init__(self, device: torch.device | str, *, holds: bool = False) -> None:
        self.device = torch.device(device)
        self.holds = holds
        self.host_ms = 0.0
        self._scratch: Tensor | None = None
        if self.device.type == "cuda":
            self._scratch = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)

    def __call__(self, call: Callable[[], object]) -> float:
        """Milliseconds of one call: by events on a GPU, else by the clock."""
        if self._scratch is None:
            started = time.perf_counter()
            call()
            self.host_ms = 1e3 * (time.perf_counter() - started)
            return self.host_ms
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._scratch.zero_()
        if self.holds:
            hold_device(self.device)
        begin.record()
        started = time.perf_counter()
        call()
        self.host_ms = 1e3 * (time.perf_counter() - started)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def hold_device(device: torch.device) -> None:
    """Keep a GPU's current stream busy while the host launches what comes next."""
    if device.type == "cuda":
        torch.cuda._sleep(HOLD_CYCLES)


def time_interleaved(
    variants: Mapping[str, Callable[[int], object]],
    *,
    device: torch.device | str,
    effort: Effort,
    around: Mapping[str, Callable[[], AbstractContextManager[Any]]] | None = None,
    seconds_per_round: float | None = None,
    holds: bool = False,
) -> dict[str, Timing | Failure]:
    """Time variants in turn, so that whatever drifts drifts for all of them.

    Args:
        variants: calls by name; each gets the number of the round, to choose its inputs by.
        device: where the work runs.
        effort: how long.
        around: what a variant's calls happen inside, by name, entered before the clock starts.
        seconds_per_round: a round's duration if it is known from calls that were made already;
            rounds of seconds then need no warm-up. Default: measured in a round of warm-up.
        holds: see :class:`Stopwatch`.

    Returns:
        A result for every variant; one that runs out of memory is left out from then on.
    """
    stopwatch = Stopwatch(device, holds=holds)
    failures: dict[str, Timing | Failure] = {}
    samples: dict[str, list[float]] = {name: [] for name in variants}
    hosts: dict[str, list[float]] = {name: [] for name in variants}

    def run(name: str, index: int) -> float | None:
        if name in failures:
            return None
        place = (around or {}).get(name, nullcontext)
        try:
            with place():
                return stopwatch(lambda: variants[name](index))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failures[name] = Failure.of(error)
        release_memory(collects=True)  # after the handler: the traceback holds tensors
        return None

    if seconds_per_round is None or seconds_per_round < LONG_ROUND:
        warm = [run(name, 0) or 0.0 for name in variants]
        seconds_per_round = sum(warm) / 1e3
    for index in range(effort.num_rounds(seconds_per_round)):
        for name in variants:
            sample = run(name, index)
            if sample is not None:
                samples[name].append(sample)
                if stopwatch.device.type == "cuda":
                    hosts[name].append(stopwatch.host_ms)
    return {
        name: failures.get(name) or Timing(tuple(samples[name]), tuple(hosts[name]))
        for name in variants
    }


def run_in_stages(
    method: AttentionMethod, q: Tensor, k: Tensor, v: Tensor, *, scale: float
) -> dict[str, float]:
    """Milliseconds of each stage of one call of a method.

    Everything up to the plan is "selection" but what the code inside marks otherwise ("order",
    "gather"); everything after it is "attention", likewise.
    """
    previous = method.recorder
    with StageTimer(q.device) as timer:
        first, second = stage("selection"), stage("attention")

        def switch(record: CallRecord) -> None:
            first.__exit__(None, None, None)
            if previous is not None:
                previous(record)
            second.__enter__()

        method.recorder = switch
        try:
            first.__enter__()
            method(q, k, v, scale=scale)
            second.__exit__(None, None, None)
        finally:
            method.recorder = previous
    return timer.milliseconds()


def measure_rates(device: torch.device | str, dtype: torch.dtype) -> Rates:
    """Rates for floors: measured earlier for a known GPU, else by a matrix product and a copy."""
    device = torch.device(device)
    name = "CPU"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = known_rates(name)
        if known is not None:
            return known
    side, num_floats = (8192, 1 << 28) if device.type == "cuda" else (1024, 1 << 24)
    stopwatch = Stopwatch(device)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.randn(num_floats, device=device)
    target = torch.empty_like(source)
    product = min(stopwatch(lambda: a @ b) for _ in range(5))
    copy = min(stopwatch(lambda: target.copy_(source)) for _ in range(5))
    return Rates(
        f"{name}, matrix product and copy measured in this process",
        flops=2e3 * side**3 / product,
        bandwidth=2e3 * source.nbytes / copy,
    )

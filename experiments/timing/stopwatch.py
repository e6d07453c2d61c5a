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

from experiments.memory import is_out_of_memory, release_memory
from experiments.settings.ranks import gather_over_ranks
from experiments.statistics import quantiles
from experiments.timing.cost_model import Rates, known_rates
from experiments.timing.densities import UnreachableDensityError
from experiments.timing.samples import agree, summarise
from pbs.methods.base import AttentionMethod, CallRecord
from pbs.ops.stages import StageTimer, stage

# Written before every timed call on a GPU: its second-level cache (50 MB on an H100) then holds
# nothing of the inputs.
FLUSH_BYTES = 256 << 20
# Clock cycles for which a device is held: 4 ms at 2 GHz, longer than any method launches kernels.
HOLD_CYCLES = 8_000_000
# Seconds of a call from which on more than a few of them would cost more than they tell.
LONG_ROUND = 2.0
# Calls of a variant's warm-up at most, and of one that takes LONG_ROUND seconds a call.
MOST_WARM_UP = 10
MOST_LONG_WARM_UP = 2
# Milliseconds of a call that need no device held: launching takes some, a hundredth of it.
LONG_CALL_MS = 400.0


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
        samples_ms: what each call took, on the device.
        wall_samples_ms: how long a caller waited for a call, synchronised before and after it.
        dropped_ms: calls of the warm-up, which count for nothing.
        is_warm: whether the last two of them agreed; False: the samples may be cold.
    """

    samples_ms: tuple[float, ...]
    wall_samples_ms: tuple[float, ...] = ()
    dropped_ms: tuple[float, ...] = ()
    is_warm: bool = True

    @property
    def median_ms(self) -> float:
        """Middle of the samples."""
        return quantiles(self.samples_ms).median

    def to_dict(self) -> dict[str, Any]:
        """Medians, 20th and 80th percentiles, counts, and every sample."""
        return {
            **summarise(self.samples_ms, self.wall_samples_ms),
            "dropped_ms": list(self.dropped_ms),
            "is_warm": self.is_warm,
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
            model whose earlier layers still run. The time is then the device's own, and ``wall_ms``
            is None. Without it a short call is as slow as its launches, as for a caller who waits.

    Attributes:
        host_ms: how long the host was busy with the last call.
        wall_ms: how long a caller waited for the last call, the device idle before it; None if the
            device was held.
    """

    def __init__(self, device: torch.device | str, *, holds: bool = False) -> None:
        self.device = torch.device(device)
        self.holds = holds
        self.host_ms = 0.0
        self.wall_ms: float | None = None
        self._scratch: Tensor | None = None
        if self.device.type == "cuda":
            self._scratch = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)

    def __call__(self, call: Callable[[], object]) -> float:
        """Milliseconds of one call: by events on a GPU, else by the clock."""
        if self._scratch is None:
            started = time.perf_counter()
            call()
            self.host_ms = self.wall_ms = 1e3 * (time.perf_counter() - started)
            return self.host_ms
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._scratch.zero_()
        if self.holds:
            hold_device(self.device)
        else:
            torch.cuda.synchronize(self.device)
        begin.record()
        started = time.perf_counter()
        call()
        self.host_ms = 1e3 * (time.perf_counter() - started)
        end.record()
        end.synchronize()
        self.wall_ms = None if self.holds else 1e3 * (time.perf_counter() - started)
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
    earlier_ms: Mapping[str, float] | None = None,
    holds: bool = False,
) -> dict[str, Timing | Failure]:
    """Warm variants up, then time them in turn, so that whatever drifts drifts for all of them.

    A variant is warm when two calls in a row agree (:func:`experiments.timing.samples.agree`), at
    most ``MOST_WARM_UP`` calls. Then a round measures each once: the time of the device and, in the
    same call or, where the device is held, in another one, the time that a caller waits.

    Args:
        variants: calls by name; each gets a number, to choose its inputs by.
        device: where the work runs.
        effort: how long; the calls of the warm-up come on top.
        around: what a variant's calls happen inside, by name, entered before the clock starts.
        earlier_ms: milliseconds of a call that was made already, by name: the first of the warm-up.
        holds: see :class:`Stopwatch`; calls of which even the shortest takes ``LONG_CALL_MS`` are
            not held, since launching them takes no time to speak of.

    Returns:
        A result for every variant; one that runs out of memory is left out from then on.
    """
    timer = _Timer(variants, Stopwatch(device, holds=holds), around or {})
    for name in variants:
        timer.warm_up(name, (earlier_ms or {}).get(name))
    stopwatch = timer.stopwatch
    last = [calls[-1] for name, calls in timer.dropped.items() if name not in timer.failures]
    if stopwatch.holds and last and min(last) >= LONG_CALL_MS:
        stopwatch.holds = False
    num_measurements = 2 if stopwatch.holds and stopwatch.device.type == "cuda" else 1
    for index in range(effort.num_rounds(num_measurements * sum(last) / 1e3)):
        for name in variants:
            timer.measure(name, index)
    return {name: timer.result(name) for name in variants}


class _Timer:
    """The calls of :func:`time_interleaved` so far."""

    def __init__(
        self,
        variants: Mapping[str, Callable[[int], object]],
        stopwatch: Stopwatch,
        around: Mapping[str, Callable[[], AbstractContextManager[Any]]],
    ) -> None:
        self.variants, self.stopwatch, self.around = variants, stopwatch, around
        self.failures: dict[str, Failure] = {}
        self.samples: dict[str, list[float]] = {name: [] for name in variants}
        self.waits: dict[str, list[float]] = {name: [] for name in variants}
        self.dropped: dict[str, list[float]] = {name: [] for name in variants}
        self.is_warm: dict[str, bool] = dict.fromkeys(variants, False)

    def warm_up(self, name: str, earlier: float | None) -> None:
        """Call until two calls in a row agree, in every process that shares the model."""
        calls = self.dropped[name]
        calls += [] if earlier is None else [earlier]
        for index in range(MOST_WARM_UP):
            sample = self._call(name, index)
            if sample is None:
                return
            calls.append(sample)
            is_long = sample >= 1e3 * LONG_ROUND and index + 1 >= MOST_LONG_WARM_UP
            now = len(calls) > 1 and agree(*calls[-2:])
            everywhere = gather_over_ranks((now, is_long))
            self.is_warm[name] = all(warm for warm, _ in everywhere)
            if self.is_warm[name] or any(long for _, long in everywhere):
                return

    def measure(self, name: str, index: int) -> None:
        """One round of one variant."""
        sample = self._call(name, index)
        if sample is None:
            return
        if self.stopwatch.wall_ms is None:
            self.stopwatch.holds = False
            has_waited = self._call(name, index) is not None
            self.stopwatch.holds = True
            if not has_waited:
                return
        wait = self.stopwatch.wall_ms
        assert wait is not None
        self.samples[name].append(sample)
        self.waits[name].append(wait)

    def result(self, name: str) -> Timing | Failure:
        """What came of a variant."""
        return self.failures.get(name) or Timing(
            tuple(self.samples[name]),
            tuple(self.waits[name]),
            tuple(self.dropped[name]),
            self.is_warm[name],
        )

    def _call(self, name: str, index: int) -> float | None:
        if name in self.failures:
            return None
        try:
            with self.around.get(name, nullcontext)():
                return self.stopwatch(lambda: self.variants[name](index))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.failures[name] = Failure.of(error)
        release_memory(collects=True)  # after the handler: the traceback holds tensors
        return None


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

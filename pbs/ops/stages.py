"""Names for the parts of a call, so that a benchmark can time them; free when nobody listens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from contextvars import Token

_IDLE = nullcontext()
_active: ContextVar[StageTimer | None] = ContextVar("stage_timer", default=None)


def stage(name: str) -> AbstractContextManager[None]:
    """Mark the work inside as one part of a call: "order", "gather", "selection", "attention".

    Costs one look-up unless a :class:`StageTimer` is active. Stages may nest; the time of an inner
    one then counts for it and not for the outer.
    """
    timer = _active.get()
    return _IDLE if timer is None else timer.measure(name)


class StageTimer:
    """Sums the time of each stage while it is active.

    On a CUDA device stages are measured with events on the current stream: no stage waits for the
    device, so the sum of the stages is that of an undisturbed call, less the gaps between them.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._is_cuda = torch.device(device).type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._open: list[str] = []
        self._token: Token[StageTimer | None] | None = None

    def __enter__(self) -> StageTimer:
        self._token = _active.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        _active.reset(self._token)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time one stage."""
        self._open.append(name)
        self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._mark()

    def milliseconds(self) -> dict[str, float]:
        """Time of each stage so far; waits for the device."""
        if self._is_cuda:
            torch.cuda.synchronize()
        total: dict[str, float] = {}
        for (name, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if name:
                total[name] = total.get(name, 0.0) + _difference(begin, end)
        return total

    def _mark(self) -> None:
        """From here on time belongs to the innermost open stage, or to none."""
        now: float | torch.cuda.Event = 0.0
        if self._is_cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((self._open[-1] if self._open else "", now))


def _difference(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    """Milliseconds between two marks."""
    if isinstance(begin, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return begin.elapsed_time(end)
    assert not isinstance(end, torch.cuda.Event)
    return (end - begin) * 1e3

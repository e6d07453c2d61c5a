"""How busy other processes keep the processors while something is timed.

Importable without hydra, torch and wandb. Linux tells; elsewhere the numbers are None.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

# From this share of the processors on that others keep busy, times are said to be disturbed.
LOADED = 0.25
STAT = "/proc/stat"


class LoadMeter:
    """The share of this process's processors that others kept busy, since it was made or read."""

    def __init__(self) -> None:
        self._last = _read()

    def lap(self) -> float | None:
        """Share in [0, 1] since the last lap; None where the system does not tell.

        Processors are those that this process may use; its own threads and ended children are taken
        off. The clock of the system ticks every 10 ms: shorter laps are coarse.
        """
        before, self._last = self._last, _read()
        if before is None or self._last is None:
            return None
        busy, own, seconds = (now - then for now, then in zip(self._last, before, strict=True))
        if seconds <= 0:
            return 0.0
        return min(1.0, max(0.0, (busy - own) / (seconds * _num_processors())))


def mean_load(records: Sequence[dict[str, Any]]) -> float | None:
    """Mean of the "load" of some records; None if none has one."""
    known = [record["load"] for record in records if record.get("load") is not None]
    return sum(known) / len(known) if known else None


def load_warning(load: float | None) -> str | None:
    """A sentence if others kept more than ``LOADED`` of the processors busy."""
    if load is None or load <= LOADED:
        return None
    return (
        f"other processes kept {load:.0%} of the processors busy: times are disturbed, and ratios "
        "between runs made one after another may be too; repeat them on an idle machine"
    )


def _read() -> tuple[float, float, float] | None:
    """Seconds that the processors were busy, that this process was, and the clock."""
    try:
        with open(STAT) as file:
            lines = [line.split() for line in file if line.startswith("cpu")]
    except OSError:
        return None
    names = {f"cpu{number}" for number in _processors()}
    ticks = 0
    for name, *values in lines:
        if name in names:
            user, nice, system, _, _, irq, softirq = map(int, values[:7])
            ticks += user + nice + system + irq + softirq
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    return ticks / os.sysconf("SC_CLK_TCK"), own, time.monotonic()


def _processors() -> Sequence[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)


def _num_processors() -> int:
    return len(_processors())

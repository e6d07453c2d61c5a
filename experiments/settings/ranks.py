"""The processes that share one model under ``torchrun``: their numbers put together.

Importable without hydra and wandb. Alone, every function gives back what it got.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def rank() -> int:
    """Number of this process in its ``torchrun`` group; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def num_ranks() -> int:
    """Processes in the ``torchrun`` group; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_follower() -> bool:
    """Whether another process writes the results."""
    return rank() > 0


def is_shared() -> bool:
    """Whether this process has a part of the heads only."""
    import torch.distributed as dist

    return num_ranks() > 1 and dist.is_available() and dist.is_initialized()


def gather_over_ranks(value: T) -> list[T]:
    """The value of every process, in the order of their ranks; all must call this."""
    import torch.distributed as dist

    if not is_shared():
        return [value]
    values: list[T | None] = [None] * num_ranks()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def mean_over_ranks(values: Sequence[float | None]) -> list[float | None]:
    """Means of numbers that each process knows for its share of the heads; None stays None."""
    columns = zip(*gather_over_ranks(list(values)), strict=True)
    return [_mean([value for value in column if value is not None]) for column in columns]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None

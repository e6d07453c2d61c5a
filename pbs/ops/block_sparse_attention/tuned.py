"""Launch options measured on a machine, kept on disk: ``python -m experiments.tools.tune``.

Nothing is measured in the middle of a run: the same table gives the same rounding every time, and
without a table the options are the packaged ones.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

VARIABLE = "PBS_LAUNCH_OPTIONS"

Options = TypeVar("Options", bound=tuple[Any, ...])


def table_path() -> Path:
    """Where the table lies: what PBS_LAUNCH_OPTIONS names, else in the user's cache folder."""
    return _path_of(os.environ.get(VARIABLE), os.environ.get("XDG_CACHE_HOME"))


@lru_cache(maxsize=4)
def _path_of(named: str | None, cache: str | None) -> Path:
    """Kept: every call of a kernel asks."""
    if named:
        return Path(named)
    return Path(cache or Path.home() / ".cache") / "pbs" / "launch_options.json"


def key_of(kernel: str, shape: dict[str, Any]) -> str:
    """What a measurement is good for: device, compiler, kernel and shape."""
    import triton

    sizes = "/".join(f"{name}={shape[name]}" for name in sorted(shape) if name != "capability")
    return f"{torch.cuda.get_device_name()} | Triton {triton.__version__} | {kernel} {sizes}"


def tuned(kernel: str, shape: dict[str, Any], default: Options) -> Options:
    """The measured options, or the default where nothing was measured.

    Args:
        kernel: name of the kernel.
        shape: what the default was chosen by.
        default: a named tuple; its fields are the table's.

    Raises:
        ValueError: the table has options this version does not know.
    """
    table = read_table(table_path())
    if not table or not torch.cuda.is_available():
        return default
    entry = table.get(key_of(kernel, shape))
    if entry is None:
        return default
    try:
        return type(default)(**entry)
    except TypeError as error:
        raise ValueError(
            f"{table_path()} has launch options of another version ({error}); delete it or run "
            "python -m experiments.tools.tune again"
        ) from error


@lru_cache(maxsize=4)
def read_table(path: Path) -> dict[str, dict[str, Any]]:
    """All entries by key; empty if there is no table. Read once per process."""
    if not path.exists():
        return {}
    table: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return table

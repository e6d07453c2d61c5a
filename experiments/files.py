"""Files that other processes read while they are written."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_SCRATCH = re.compile(r"\..+\.\d+")


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON without NaN and infinity, which most readers refuse: they become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False, ensure_ascii=False)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old or the new content and nothing between."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError:  # a full disk: half a file helps nobody and takes space
        scratch.unlink(missing_ok=True)
        raise


def remove_scratch(folder: Path, *, older_than: float = 0.0) -> None:
    """Remove what killed processes had not finished writing.

    Args:
        folder: not those below it.
        older_than: in seconds; other processes may be writing younger ones.
    """
    for path in folder.iterdir():
        if _SCRATCH.fullmatch(path.name):
            with suppress(FileNotFoundError):  # written, or removed, by now
                if time.time() - path.stat().st_mtime >= older_than:
                    path.unlink()


def _broken(message: str, kind: str = "ValueError") -> dict[str, Any]:
    return {"status": "broken", "error": {"type": kind, "message": message}}


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value

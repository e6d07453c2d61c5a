"""The folder of a run: ``config.yaml env.json samples.jsonl metrics.json run.log``.

Samples are appended as they are made and survive a kill at any moment; ``metrics.json`` is written
whole or not at all. A lock keeps two processes from writing the same run.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

logger = logging.getLogger(__name__)

Record = dict[str, Any]


class RunStore:
    """Reads and writes the folder of one run.

    Args:
        folder: the run's folder; made when first written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.samples_path = folder / "samples.jsonl"
        self.metrics_path = folder / "metrics.json"
        self.config_path = folder / "config.yaml"
        self.log_path = folder / "run.log"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; waits for another process that holds it.

        The operating system frees the lock when a process ends, however it ends.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("another process works on %s; waiting for it", self.folder)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def metrics(self) -> dict[str, Any]:
        """Content of ``metrics.json``; empty if the run has not ended.

        A file that is not JSON (something else wrote it) reads as a run with the status "broken":
        the same command measures what is missing and writes it anew.
        """
        if not self.metrics_path.exists():
            return {}
        try:
            return json.loads(self.metrics_path.read_text())
        except ValueError as error:
            message = f"{self.metrics_path} is no JSON: {error}"
            return {"status": "broken", "error": {"type": "ValueError", "message": message}}

    def samples(self) -> list[Record]:
        """All complete records, each ``sample_id`` once, in the order they were made.

        A half-written last line, as a killed process leaves it, is not a record.

        Raises:
            ValueError: a broken line that is not the last.
        """
        if not self.samples_path.exists():
            return []
        lines = self.samples_path.read_bytes().split(b"\n")
        records: dict[str, Record] = {}
        for number, line in enumerate(lines[:-1], start=1):  # what follows the last "\n" is half
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{self.samples_path}, line {number} is broken ({error}); delete the line and "
                    "run the same command again: that sample is measured anew"
                ) from error
            records.setdefault(record["sample_id"], record)
        return list(records.values())

    @contextmanager
    def appending(self) -> Iterator[Appender]:
        """Append records; first cuts off a half-written last line."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.samples_path.open("ab+") as file:
            file.seek(0)
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
            yield Appender(file)

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write ``metrics.json``, whole or not at all."""
        write_atomically(self.metrics_path, to_json(metrics, indent=2) + "\n")

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write ``config.yaml``, the resolved configuration."""
        write_atomically(self.config_path, yaml.safe_dump(dict(config), sort_keys=False))

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Write ``env.json``; keeps the environment that made the samples which are there."""
        path = self.folder / "env.json"
        if path.exists() and self.samples_path.exists():
            environment = {**environment, "resumed_from": json.loads(path.read_text())}
        write_atomically(path, to_json(environment, indent=2) + "\n")

    def clear(self) -> None:
        """Forget samples and metrics."""
        self.samples_path.unlink(missing_ok=True)
        self.metrics_path.unlink(missing_ok=True)


class Appender:
    """Writes one record a line; each is on disk before the next is made."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def append(self, record: Record) -> None:
        """Append one record."""
        self._file.write(to_json(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON without NaN and infinity, which most readers refuse: they become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False, ensure_ascii=False)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new content and nothing between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with scratch.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value

"""The folder of a run: ``config.yaml env.json samples.jsonl metrics.json run.log``.

Samples are appended as they are made and survive a kill at any moment; ``metrics.json`` is written
whole or not at all. A lock keeps two processes from writing the same run, and ``.open`` marks one
that has begun and not come to its end.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from experiments.content import file_digest
from experiments.files import remove_scratch, to_json, write_atomically
from experiments.run_environments import add_environment, environments_in

logger = logging.getLogger(__name__)

Record = dict[str, Any]

# Type of the error of a run whose samples are not those that its metrics sum up.
CHANGED = "SamplesChanged"


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
        self._environment_path = folder / "env.json"
        self._open_path = folder / ".open"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; waits for another process that holds it.

        The operating system frees the lock when a process ends, however it ends. What a killed
        process had not finished writing is removed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("another process works on %s; waiting for it", self.folder)
                fcntl.flock(file, fcntl.LOCK_EX)
            remove_scratch(self.folder)
            yield

    @property
    def is_open(self) -> bool:
        """Whether a process began this run and ended, or was killed, before :meth:`close`."""
        return self._open_path.exists()

    def open(self) -> None:
        """Mark the run as begun."""
        self._open_path.touch()

    def close(self) -> None:
        """Mark the run as ended: metrics, pictures and tracking are done, or have failed."""
        self._open_path.unlink(missing_ok=True)

    def metrics(self) -> dict[str, Any]:
        """Content of ``metrics.json``; empty if the run has not ended.

        A file that is not JSON (something else wrote it) reads as a run with the status "broken":
        the same command measures what is missing and writes it anew. So does one that was written
        for other samples than those in ``samples.jsonl``, by their digest; metrics from before
        there was a digest are taken at their word.
        """
        if not self.metrics_path.exists():
            return {}
        try:
            metrics = json.loads(self.metrics_path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            return _broken(f"{self.metrics_path} is no JSON: {error}")
        if not isinstance(metrics, dict) or "status" not in metrics:
            return _broken(f"{self.metrics_path} is no object with a status")
        results = metrics.get("results")
        has_total = isinstance(results, dict) and isinstance(results.get("total"), dict)
        if metrics["status"] == "finished" and not has_total:
            return _broken(f"{self.metrics_path} says finished, but has no results")
        stated = metrics.get("samples_digest")
        if stated is not None and stated != self.samples_digest():
            return _broken(
                f"{self.metrics_path} was written for other samples than those in "
                f"{self.samples_path.name}, which was edited, cut or replaced since: restore that "
                "file, or run the same command with resume=false, which measures everything again",
                CHANGED,
            )
        return metrics

    def samples_digest(self) -> str | None:
        """Digest of ``samples.jsonl`` as it is; None without it."""
        try:
            return file_digest(self.samples_path)
        except FileNotFoundError:
            return None

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
                records.setdefault(record["sample_id"], record)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"{self.samples_path}, line {number} is broken ({error}); delete the line, and "
                    "metrics.json if it is there, and run the same command again: that sample is "
                    "measured anew"
                ) from error
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
        """Write ``env.json``; keeps the environments that made the samples which are there.

        The latest stands first, the others by their ids under "earlier". A run that continues in
        the same environment leaves the file as it is.
        """
        before = self._environment() if self.samples_path.exists() else {}
        content = add_environment(before, environment)
        if content != before:
            write_atomically(self._environment_path, to_json(content, indent=2) + "\n")

    def environments(self) -> dict[str, Mapping[str, Any]]:
        """The environments of ``env.json`` by their ids, the latest first; empty without it."""
        return environments_in(self._environment())

    def _environment(self) -> Mapping[str, Any]:
        path = self._environment_path
        if not path.exists():
            return {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            return {"error": f"was no JSON: {error}"}
        return content if isinstance(content, dict) else {"error": "was no JSON object"}

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


def _broken(message: str, kind: str = "ValueError") -> dict[str, Any]:
    return {"status": "broken", "error": {"type": kind, "message": message}}

"""``pbs:*`` in vLLM's ``/metrics``: counts of all workers, read when the page is asked for."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pbs.patch.vllm.counters import FOLDER


def publish() -> None:
    """In the first process of a server: name the folder and register what reads it."""
    if FOLDER in os.environ:
        return  # a worker
    folder = tempfile.mkdtemp(prefix="pbs-serving-")
    os.environ[FOLDER] = folder
    atexit.register(_remove, folder, os.getpid())
    from prometheus_client import REGISTRY

    REGISTRY.register(Collector(Path(folder)))


def _remove(folder: str, owner: int) -> None:
    """Remove the folder when the process that made it ends; forked ones run this, too."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


class Collector:
    """Reads the workers' files.

    Args:
        folder: with a file for each worker.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def collect(self) -> Iterator[Any]:
        """Counters by worker and layer; density is the ratio of the last two."""
        from prometheus_client.core import CounterMetricFamily

        where = ["worker", "layer"]
        chunks = CounterMetricFamily(
            "pbs:prompt_chunks",
            "Chunks of prompts, by how they were computed.",
            labels=[*where, "computed"],
        )
        tiles = CounterMetricFamily("pbs:tiles", "Attention tiles computed.", labels=where)
        causal = CounterMetricFamily(
            "pbs:causal_tiles", "Tiles that dense attention would compute.", labels=where
        )
        for path in sorted(self.folder.glob("*.json")):
            for layer, counts in json.loads(path.read_text()).items():
                place = [path.stem, layer]
                chunks.add_metric([*place, "sparse"], counts["sparse"])
                for reason, count in counts["dense"].items():
                    chunks.add_metric([*place, f"dense: {reason}"], count)
                tiles.add_metric(place, counts["tiles"])
                causal.add_metric(place, counts["causal_tiles"])
        yield from (chunks, tiles, causal)

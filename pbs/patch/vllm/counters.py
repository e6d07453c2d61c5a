"""What a worker computed, per layer; in a file of its own where the server's processes share one.

vLLM's workers are processes, and its page of metrics is made by another one. Each worker keeps a
file in a folder that all of them inherit; see :mod:`pbs.patch.vllm.metrics`.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pbs.methods.base import CallRecord

# Below vLLM's logger, so that its configuration shows these lines.
logger = logging.getLogger("vllm.pbs")

# Names the folder, in the environment that workers inherit.
FOLDER = "PBS_SERVING_FOLDER"
# Seconds from one writing of the file to the next.
PERIOD = 0.5


@dataclass
class LayerCounts:
    """Chunks of prompts that one layer computed.

    Attributes:
        sparse: chunks that ran sparse.
        dense: those that ran dense, by reason.
        tiles: computed, over heads, of all chunks that the method saw.
        causal_tiles: those that dense attention would have computed.
    """

    sparse: int = 0
    dense: dict[str, int] = field(default_factory=dict)
    tiles: Tensor | int = 0  # on the device until it is read
    causal_tiles: int = 0

    def add_dense(self, reasons: dict[str, int]) -> None:
        """Count chunks that vLLM computed."""
        for reason, count in reasons.items():
            if count:
                self.dense[reason] = self.dense.get(reason, 0) + count

    def add_record(self, record: CallRecord) -> None:
        """Count a chunk that the method saw."""
        plan = record.plan
        if plan.is_dense:
            self.add_dense({plan.reason or "dense plan": 1})
        else:
            self.sparse += 1
        self.tiles = self.tiles + plan.num_tiles().sum()
        self.causal_tiles += plan.grid.num_causal_tiles * plan.batch_size * plan.num_heads

    def to_dict(self) -> dict[str, Any]:
        """Plain data; waits for the device."""
        tiles = int(self.tiles)
        density = tiles / self.causal_tiles if self.causal_tiles else None
        return {
            "sparse": self.sparse,
            "dense": self.dense,
            "tiles": tiles,
            "causal_tiles": self.causal_tiles,
            "density": density,
        }


class Counters:
    """Of all layers of this process."""

    def __init__(self) -> None:
        self._layers: dict[int, LayerCounts] = {}
        self._is_started = False
        self._written = 0.0

    def start(self) -> bool:
        """Write at the end, too. Returns whether this was the first call."""
        if self._is_started:
            return False
        self._is_started = True
        atexit.register(self.finish)
        return True

    def finish(self) -> None:
        """Write, and say in a line what was computed."""
        self.write()
        logger.info("pbs: %s", self.summary())

    def summary(self) -> str:
        """Chunks and density of all layers."""
        counts = self._layers.values()
        sparse = sum(one.sparse for one in counts)
        dense = sum(sum(one.dense.values()) for one in counts)
        tiles = sum(int(one.tiles) for one in counts)
        causal = sum(one.causal_tiles for one in counts)
        density = f"{tiles / causal:.3f} of the causal tiles" if causal else "no tile"
        return (
            f"{sparse} chunks of prompts sparse, {dense} dense over all layers; {density} computed"
        )

    def layer(self, layer_idx: int) -> LayerCounts:
        """Counts of a layer."""
        return self._layers.setdefault(layer_idx, LayerCounts())

    def reset(self) -> None:
        """Forget everything."""
        self._layers.clear()

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain data by layer."""
        return {str(index): counts.to_dict() for index, counts in sorted(self._layers.items())}

    def write_sometimes(self) -> None:
        """Write if that was long ago: reading counts waits for the device."""
        if time.monotonic() - self._written > PERIOD:
            self.write()

    def write(self) -> None:
        """Write this process's file, whole or not at all, if a folder is named."""
        folder = os.environ.get(FOLDER)
        self._written = time.monotonic()
        if not folder or not Path(folder).is_dir():
            return
        path = Path(folder) / f"{os.getpid()}.json"
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(self.to_dict()))
        draft.replace(path)


COUNTERS = Counters()


class WorkerExtension:
    """For vLLM's ``worker_extension_cls``: ``llm.collective_rpc("pbs_report")``."""

    def pbs_report(self) -> dict[str, dict[str, Any]]:
        """Counts of this worker, by layer."""
        return COUNTERS.to_dict()

    def pbs_reset(self) -> None:
        """Start to count anew."""
        COUNTERS.reset()

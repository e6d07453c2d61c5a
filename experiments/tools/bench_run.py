"""One invocation of ``make bench`` or ``make bench-gpu``: its sizes, its results, its clock.

Needs no hydra and no wandb.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from experiments.files import to_json, write_atomically
from experiments.memory import (
    is_out_of_memory,
    release_memory,
)
from experiments.run_environments import differing_parts
from experiments.settings.environment import describe_environment
from experiments.timing.cost_model import Shape
from experiments.timing.dense_kernels import dense_kernels
from experiments.timing.inputs import Cell, Record
from experiments.timing.result_folders import add_record, write_tables
from experiments.timing.stopwatch import (
    measure_rates,
)
from pbs.methods import AttentionMethod, build_method

# Longest cells with structured inputs: above, drawing them on the host would take most of the time.
MAX_STRUCTURED = 131072
# Assumed when predicting whether a cell still fits: dense FLOP/s of the slowest kernel.
PREDICTED_FLOPS = {"cuda": 350e12, "cpu": 2e10}


@dataclass(frozen=True)
class Plan:
    """Sizes of a run."""

    shape: str = "32/8/128"
    table7_lengths: tuple[int, ...] = (8192, 16384, 32768, 65536, 131072, 262144, 524288)
    selection_lengths: tuple[int, ...] = (8192, 16384, 32768, 65536, 131072)
    # What everybody asks for first; then as many as there is time for.
    ttft_lengths: tuple[int, ...] = (131072, 8192, 16384, 32768, 65536, 262144)
    gate_lengths: tuple[int, ...] = (1000, 4096)
    gate_shapes: tuple[str, ...] = ("8/2/128", "8/2/64", "8/2/96", "4/4/256")
    model_changes: dict[str, int] = field(default_factory=dict)
    methods: dict[str, tuple[str, dict[str, Any]]] = field(
        default_factory=lambda: {
            "pbs": ("pbs", {}),
            "pbs shared": ("pbs", {"gqa": "shared"}),
            "pbs_plus": ("pbs_plus", {}),
            "meanpool": ("meanpool", {}),
            "xattention": ("xattention", {}),
            "flexprefill": ("flexprefill", {}),
            "prism": ("prism", {}),
            "minference": ("minference", {"preset": "llama31-v2"}),
            "streaming": ("streaming", {}),
        }
    )

    @classmethod
    def smoke(cls) -> Plan:
        """Seconds on a CPU."""
        small = {"vertical_size": 64, "slash_size": 256}
        return cls(
            shape="4/2/32",
            table7_lengths=(512, 1024),
            selection_lengths=(512, 1024),
            ttft_lengths=(512, 1024),
            gate_lengths=(300, 600),
            gate_shapes=("4/2/32",),
            model_changes={
                "num_hidden_layers": 2,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 32,
                "vocab_size": 256,
            },
            methods={
                "pbs": ("pbs", {}),
                "pbs shared": ("pbs", {"gqa": "shared"}),
                "minference": ("minference", small),
                "streaming": ("streaming", {"n_init": 32, "n_local": 128}),
            },
        )

    def build(self, *labels: str) -> dict[str, AttentionMethod]:
        """Methods by label; default all."""
        return {
            label: build_method(name, **params)
            for label, (name, params) in self.methods.items()
            if not labels or label in labels
        }


class BenchRun:
    """One invocation: what it measures on, what it has found, what time is left.

    Args:
        out: folder for the results.
        device: what is measured.
        plan: sizes.
        commit: of the files, where the repository is not at hand.
        adds: keep what an earlier command in the same environment has left in the folder: parts and
            cells that are not measured again stay.

    Raises:
        ValueError: ``adds``, and the folder's results come from another environment.
    """

    def __init__(
        self,
        out: Path,
        device: torch.device,
        plan: Plan,
        *,
        commit: str | None,
        adds: bool = False,
    ) -> None:
        self.out, self.device, self.plan = out, device, plan
        is_cuda = device.type == "cuda"
        self.dtype = torch.bfloat16 if is_cuda else torch.float32
        self.rates = measure_rates(device, self.dtype)
        self.dense = dense_kernels(device)
        environment = describe_environment()
        environment["commit"] = commit or environment["commit"]
        if commit is not None:  # the files came without the repository
            environment["is_dirty"] = None
        if is_cuda:
            properties = torch.cuda.get_device_properties(device)
            environment["memory_bytes"] = properties.total_memory
        command = " ".join(["python -m experiments.tools.bench_gpu", *sys.argv[1:]])
        earlier = _earlier_results(out, environment) if adds else {}
        self.results: Record = {
            "environment": earlier.get("environment", environment),
            "rates": self.rates.__dict__,
            "commands": [*earlier.get("commands", ()), command],
            "methods": {
                label: {"method": n, "params": p} for label, (n, p) in plan.methods.items()
            },
            "parts": earlier.get("parts", {}),
        }
        self.deadline = float("inf")
        self.started = time.monotonic()

    def add(self, part: str, record: Record) -> None:
        """Keep a record and write everything to disk."""
        add_record(self.results["parts"].setdefault(part, []), record)
        self.write()

    def write(self) -> None:
        """``results.json``, and the CSVs."""
        self.results["seconds"] = time.monotonic() - self.started
        write_atomically(self.out / "results.json", to_json(self.results, indent=1) + "\n")
        write_tables(self.out, self.results["parts"])

    def wrong(self) -> list[str]:
        """Variants that were wrong or raised; no memory and no such kernel are no errors."""
        found = []
        for part, records in self.results["parts"].items():
            for record in records:
                cell = {"cell": record.get("failure", {})}
                found += [
                    f"{part} N={record['length']} {name}: {entry['failure']}: "
                    f"{entry['message'][:200]}"
                    for name, entry in {**record["dense"], **record["methods"], **cell}.items()
                    if entry.get("failure") in ("incorrect", "error")
                ]
        return found

    def seconds_left(self) -> float:
        """Until this part's deadline."""
        return self.deadline - time.monotonic()

    def has_time_for(self, flops: float, *, calls: float, extra: float = 3.0) -> bool:
        """Whether that many dense calls of this work would end in time, by a pessimistic rate."""
        needed = calls * flops / PREDICTED_FLOPS[self.device.type] + extra
        return needed < self.seconds_left()

    def cell(self, length: int, *, density: float | None = None, shape: str | None = None) -> Cell:
        """A cell of this run."""
        heads = Shape.parse(shape or self.plan.shape, element_size=self.dtype.itemsize)
        structure = "mixed" if length <= MAX_STRUCTURED else "random"
        return Cell(heads, length, self.dtype, self.device, structure, density)

    def attempt(self, part: str, name: Record, measure: Callable[[], Record]) -> Record:
        """Measure one cell; whatever goes wrong is its result, and the run goes on."""
        try:
            record = {**name, **measure()}
        except Exception as error:  # noqa: BLE001 - the one boundary: a cell's failure is a result
            kind = "out of memory" if is_out_of_memory(error) else "error"
            message = f"{type(error).__name__}: {str(error).strip()[:500]}"
            if kind == "error":
                traceback.print_exc()
            failure = {"median_ms": None, "failure": kind, "message": message}
            record = {**name, "failure": failure, "dense": {}, "methods": {}}
        release_memory(collects="failure" in record)
        self.add(part, record)
        return record

    def skip(self, part: str, name: Record) -> None:
        """Record that there was no time for a cell."""
        failure = {"median_ms": None, "failure": "skipped", "message": "no time left for it"}
        self.add(part, {**name, "failure": failure, "dense": {}, "methods": {}})


def _earlier_results(out: Path, environment: Record) -> Record:
    """What the folder holds already; empty if nothing."""
    path = out / "results.json"
    if not path.is_file():
        return {}
    earlier: Record = json.loads(path.read_text(encoding="utf-8"))
    was = earlier["environment"]
    differing = differing_parts(was, environment)
    if was.get("commit") != environment["commit"]:
        differing = [*differing, "commit"]
    if differing:
        raise ValueError(
            f"{path} was measured in another environment: {', '.join(differing)} differ (there "
            f"{was.get('device')}, commit {was.get('commit')}; here {environment['device']}, "
            f"commit {environment['commit']}); give another --out, or leave out --add"
        )
    return earlier

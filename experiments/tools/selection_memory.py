"""Peak memory of each method's selection at 32K tokens, without attention itself.

``python -m experiments.tools.selection_memory`` measures every case in a process of its own, with
one thread, and writes ``experiments/measured/selection_memory.csv``. What counts is how far the
resident memory of the process rises above what it holds with queries and keys in it. The plan,
which stays, is part of that and stated beside it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from experiments.settings.config import ROOT
from experiments.settings.environment import describe_environment
from pbs.methods import build_method
from pbs.ops.plan import AttentionPlan

logger = logging.getLogger(__name__)

RESULT = ROOT / "experiments" / "measured" / "selection_memory.csv"
NUM_TOKENS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32768, 8, 2, 64
MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """A method's settings and the most its selection may take.

    Attributes:
        method: name in the registry.
        params: what is not at its default.
        bound_mib: limit of the growth at 32K tokens, the plan included.
        why: what dominates it.
    """

    method: str
    bound_mib: int
    why: str
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Name and settings."""
        return " ".join([self.method, *(f"{key}={value}" for key, value in self.params.items())])


_SORT = "Hq T² probabilities and their sort"
_LAST_QUERIES = "at most 32 MiB of the last queries' probabilities at a time"
_GROUPS = "64 MiB of group logits at a time, their softmax, and the keys once per query head"
_LINES = "the plan: windows and columns of every tile and head"
_ORDERED = "the keys in plan order, once per query head"
# Here Hq T² in fp32 are 2 MiB, the queries 64 MiB and the keys 16 MiB; all [Hq, B, N] probabilities
# would be 128 MiB, all logits of XAttention's groups 512 MiB, all of attention 32 GiB.
CASES = (
    Case("flash", 16, "no selection"),
    Case("streaming", 16, "lists of one head"),
    Case("random_blocks", 16, "T² ranks of one head at a time"),
    Case("meanpool", 32, _SORT),
    Case("prism", 32, f"{_SORT}, per band"),
    Case("flexprefill", 128, _LAST_QUERIES),
    Case("flexprefill", 128, _LAST_QUERIES, {"tau": 1.0}),
    Case("xattention", 256, _GROUPS),
    Case("xattention", 256, _GROUPS, {"stride": 16}),
    Case("minference", 192, _LINES),
    Case("minference", 192, _LINES, {"preset": "llama31-v2"}),
    Case("minference", 192, _LINES, {"preset": "adaptive", "adaptive_budget": 0.3}),
    Case("pbs", 192, _ORDERED),
    Case("pbs", 64, _ORDERED.replace("query", "key/value"), {"gqa": "shared"}),
    Case("pbs", 192, _ORDERED, {"order": "random"}),
    Case("pbs", 192, _ORDERED, {"order": "random_query"}),
    Case("pbs", 192, _ORDERED, {"order": "avg_query"}),
    Case("pbs", 192, _ORDERED, {"order": "greedy"}),
    Case("pbs", 320, f"{_ORDERED}, twice", {"order": "adaptive"}),
    Case("pbs", 320, f"{_ORDERED}, and the queries moved", {"target": "keys_then_queries"}),
    Case("pbs", 192, _ORDERED, {"selector": "maxpool"}),
    Case("pbs", 192, _ORDERED, {"selector": "low_band"}),
    Case("pbs_plus", 320, f"{_ORDERED}; {_GROUPS}"),
)


def main(arguments: list[str] | None = None) -> None:
    """Measure all cases, or one as a child process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-tokens", type=int, default=NUM_TOKENS)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.case is not None:
        case = json.loads(options.case)
        sys.stdout.write(json.dumps(measure_here(**case, num_tokens=options.num_tokens)) + "\n")
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    environment = describe_environment()
    rows = []
    for case in CASES:
        measured = measure(case, num_tokens=options.num_tokens)
        logger.info("%-60s %4d MiB", case.label, measured["peak_mib"])
        rows.append(_row(case, measured, options.num_tokens, environment))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(options.output, index=False)
    logger.info("%s", options.output)


def measure(case: Case, *, num_tokens: int = NUM_TOKENS) -> dict[str, Any]:
    """Run one case in a process of its own; see :func:`measure_here`."""
    text = json.dumps({"method": case.method, "params": case.params})
    command = [sys.executable, "-m", "experiments.tools.selection_memory"]
    command += ["--num-tokens", str(num_tokens), "--case", text]
    # Freed memory goes back to the system at once, so that it is not counted twice.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def measure_here(
    method: str, params: dict[str, Any], *, num_tokens: int = NUM_TOKENS
) -> dict[str, Any]:
    """Growth of this process's peak resident memory over one ``plan``. Linux only.

    Returns:
        ``peak_mib``, ``plan_mib`` (tensors of the plan), ``seconds`` and ``density``.
    """
    torch.set_num_threads(1)
    built = build_method(method, **params)
    built.plan(*_inputs(2048), layer_idx=0)  # loads code
    q, k = _inputs(num_tokens)
    with torch.inference_mode():
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        started = time.perf_counter()
        plan = built.plan(q, k, layer_idx=0)
        seconds = time.perf_counter() - started
        peak = _status("VmHWM") - before
    return {
        "peak_mib": round(peak / MIB),
        "plan_mib": round(_plan_bytes(plan) / MIB),
        "seconds": round(seconds, 2),
        "density": round(float(plan.density().mean()), 4),
    }


def _inputs(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of one head size in fp32, filled in place.

    A few keys stand out, as in models: with noise alone every selection would be dense.
    """
    generator = torch.Generator().manual_seed(0)
    q = torch.empty(1, NUM_HEADS, num_tokens, HEAD_DIM).normal_(generator=generator)
    k = torch.empty(1, NUM_KV_HEADS, num_tokens, HEAD_DIM).normal_(generator=generator)
    q += 1.0
    k[:, :, ::97] += 1.0
    return q, k


def _status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}; this measurement needs Linux")


def _plan_bytes(plan: AttentionPlan) -> int:
    """Memory of the plan's tensors; what shares memory counts once."""
    storages = {}
    for entry in fields(plan):
        value = getattr(plan, entry.name)
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _row(
    case: Case, measured: dict[str, Any], num_tokens: int, environment: dict[str, Any]
) -> dict[str, Any]:
    """One line of the result."""
    return {
        "method": case.method,
        "setting": " ".join(f"{key}={value}" for key, value in case.params.items()),
        "num_tokens": num_tokens,
        "num_heads": NUM_HEADS,
        "num_kv_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "dtype": "float32",
        **measured,
        "bound_mib": case.bound_mib,
        "dominated_by": case.why,
        "num_threads": 1,
        "device": environment["device"].split(",")[0],
        "python": environment["python"],
        "torch": environment["packages"]["torch"],
        "commit": environment["commit"],
        "is_dirty": environment["is_dirty"],
        "time": environment["time"],
    }


if __name__ == "__main__":
    main()

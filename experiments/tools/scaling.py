"""Time to the first token of very long prompts on many GPUs, computed; no run behind it.

    python -m experiments.tools.scaling     # rewrites the computed tables of docs/scaling.md

Heads first: the GPUs of a host share the heads of every layer (tensor parallelism). Then the
sequence: each host has 1 / S of the prompt, two pieces of it, one from either end, so that causal
attention is as much work everywhere. Segments lie in one piece, so that keys move at home. What
hosts exchange in a layer is counted by :func:`exchange`. Nothing overlaps: a real system hides part
of it. Legend: see :mod:`pbs.ops.grid`; T GPUs share the heads, S hosts the sequence.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from experiments.report.markdown import to_markdown
from experiments.settings.config import ROOT
from experiments.store import Record
from experiments.timing.cost_model import DENSE_H100, FP32, Rates
from experiments.timing.model_cost import Architecture, prefill_cost
from experiments.timing.result_folders import newest_folders
from experiments.tools.readme import RESULTS, replace_section

PAGE = ROOT / "docs" / "scaling.md"
BLOCK = 128
MILLION = 1 << 20
INT32 = 4
# Of an all-reduce over four H100s of one host, bytes a second (bus bandwidth, 1 GiB, measured).
NVLINK = 355e9
# A port of 400 Gb/s for each GPU: assumed, not measured.
NETWORK = 50e9
DENSITIES = (0.219, 0.1)


@dataclass(frozen=True)
class Cluster:
    """GPUs in hosts of eight.

    Attributes:
        num_gpus: in all.
        per_host: T, which share the heads.
    """

    num_gpus: int
    per_host: int = 8

    @property
    def num_hosts(self) -> int:
        """S."""
        return max(1, self.num_gpus // self.per_host)


def exchange(
    architecture: Architecture, num_tokens: int, cluster: Cluster, *, shared_order: bool
) -> dict[str, float]:
    """Bytes that a GPU receives from other hosts in one layer.

    Order: the last block's queries, whoever has them, and their softmax's maximum and sum.
    Selection: the mean of every key block, fp32. Gather: keys and values, which some query of each
    host selects nearly all of, and where they have moved.
    """
    shape, ranks = architecture.shape, cluster.per_host
    away = 1 - 1 / cluster.num_hosts
    orders = (shape.kv_heads if shared_order else shape.q_heads) / ranks
    return {
        "order": away * BLOCK * orders * (shape.head_dim * shape.element_size + 2 * FP32),
        "selection": away * num_tokens / BLOCK * orders * shape.head_dim * FP32,
        "gather": away * (2 * shape.key_bytes(num_tokens) / ranks + num_tokens * orders * INT32),
    }


def first_token(
    architecture: Architecture,
    num_tokens: int,
    cluster: Cluster,
    *,
    method: str = "flash",
    density: float = 1.0,
    shared_order: bool = True,
    rates: Rates = DENSE_H100,
) -> dict[str, float]:
    """Seconds: of the work, of the sums within hosts, of the exchange between them."""
    ranks = cluster.per_host
    stages = prefill_cost(
        architecture.share(ranks),
        num_tokens,
        method=method,
        density=density,
        shared_order=shared_order,
    )
    work = sum(
        max(stage.flops / rates.flops, stage.num_bytes / rates.bandwidth)
        for stage in stages.values()
    )
    hidden = num_tokens / cluster.num_hosts * architecture.hidden_size
    summed = 2 * architecture.num_layers * hidden * architecture.shape.element_size
    found = exchange(architecture, num_tokens, cluster, shared_order=shared_order)
    if method == "flash":  # keys and values alone
        away = 1 - 1 / cluster.num_hosts
        found = {"gather": away * 2 * architecture.shape.key_bytes(num_tokens) / ranks}
    return {
        "work": work / cluster.num_hosts,
        "sums": 2 * (ranks - 1) / ranks * summed / NVLINK,
        "exchange": architecture.num_layers * sum(found.values()) / NETWORK,
    }


def llama() -> Architecture:
    """Llama-3.1-8B."""
    path = ROOT / "experiments" / "architectures" / "llama31_8b" / "config.json"
    found = Architecture.of(SimpleNamespace(**json.loads(path.read_text())))
    assert found is not None
    return found


def million_table(architecture: Architecture) -> str:
    """Seconds to the first token of 2^20 tokens, computed."""
    columns: dict[str, list[str]] = {}
    for num_gpus in (8, 16, 64):
        cluster = Cluster(num_gpus)
        settings = [("dense", "flash", 1.0)]
        settings += [(f"PBS shared, density {one:g}", "pbs", one) for one in DENSITIES]
        dense = 0.0
        for label, method, density in settings:
            parts = first_token(architecture, MILLION, cluster, method=method, density=density)
            total = sum(parts.values())
            dense = dense or total
            cells = {
                "GPUs": str(num_gpus),
                "": label,
                "first token, s (computed)": f"{total:.1f}",
                **{f"{name}, s": f"{seconds:.2f}" for name, seconds in parts.items()},
                "over dense": f"{dense / total:.1f}x",
            }
            for name, cell in cells.items():
                columns.setdefault(name, []).append(cell)
    return to_markdown(columns) + "\n"


def exchange_table(architecture: Architecture) -> str:
    """MB that a GPU receives in a layer, of 2^20 tokens, computed."""
    columns: dict[str, list[str]] = {}
    for num_gpus in (16, 64):
        for shared in (False, True):
            found = exchange(architecture, MILLION, Cluster(num_gpus), shared_order=shared)
            cells = {
                "GPUs": str(num_gpus),
                "orders": "per key/value head" if shared else "per query head",
                **{f"{name}, MB a layer": f"{size / 1e6:.2f}" for name, size in found.items()},
            }
            for name, cell in cells.items():
                columns.setdefault(name, []).append(cell)
    return to_markdown(columns) + "\n"


def check_table(architecture: Architecture, records: Sequence[Record]) -> str:
    """Computed and measured, on one GPU."""
    columns: dict[str, list[str]] = {}
    for record in records:
        if not record["methods"]:
            continue
        length, density = record["length"], record["target_density"]
        pairs = [("dense (cuDNN)", "flash", 1.0, record["dense"]["cudnn"])]
        pairs.append(("PBS shared", "pbs", density, record["methods"]["pbs shared"]))
        for label, method, share, timing in pairs:
            computed = first_token(
                architecture, length, Cluster(1, per_host=1), method=method, density=share
            )["work"]
            measured = timing["median_ms"] / 1000
            cells = {
                "tokens": str(length),
                "": label,
                "density": f"{share:.3f}",
                "computed, s": f"{computed:.2f}",
                "measured, s": f"{measured:.2f}",
                "measured / computed": f"{measured / computed:.2f}",
            }
            for name, cell in cells.items():
                columns.setdefault(name, []).append(cell)
    return to_markdown(columns) + "\n"


def rewrite(text: str) -> str:
    """The page with its computed tables made again."""
    architecture = llama()
    (folder,) = newest_folders(RESULTS, part="ttft")
    for name, content in (
        ("computed", million_table(architecture)),
        ("exchanged", exchange_table(architecture)),
        ("checked", check_table(architecture, folder.parts["ttft"])),
    ):
        text = replace_section(text, name, content)
    return text


def main() -> int:
    """Rewrite docs/scaling.md."""
    PAGE.write_text(rewrite(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

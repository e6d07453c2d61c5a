"""Measures launch options on this GPU and keeps the fastest: ``python -m experiments.tools.tune``.

For each head dim and tile, every candidate computes the same random plan; one that fails to launch
or disagrees with the packaged options is left out, the others are timed in turn. The table is read
by later runs (:mod:`pbs.ops.block_sparse_attention.tuned`). Needs no hydra and no wandb.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.files import to_json, write_atomically
from experiments.timing.densities import ControlledDensity
from experiments.timing.stopwatch import VARIANT_ERRORS, Effort, Timing, time_interleaved
from pbs import build_method
from pbs.ops.block_sparse_attention import triton as kernels
from pbs.ops.block_sparse_attention import tuned
from pbs.ops.block_sparse_attention.triton_hopper_launch import HopperOptions, hopper_options
from pbs.ops.plan import AttentionPlan

Options = kernels.LaunchOptions | HopperOptions
# Bounds of what other options may change by rounding alone, for outputs of unit values in bf16.
TOLERANCE = 2e-2


def candidates(default: Options) -> Iterator[Options]:
    """The packaged options and a few neighbours."""
    yield default
    for stages in {2, 3, 4} - {default.num_stages}:
        yield default._replace(num_stages=stages)
    if isinstance(default, kernels.LaunchOptions):
        if default.block_n > 64:
            yield default._replace(block_n=default.block_n // 2, num_stages=3)
        if default.block_m > 64:
            yield default._replace(block_m=default.block_m // 2, num_warps=4)


def tune(
    head_dim: int, tile: int, *, length: int, heads: tuple[int, int], effort: Effort
) -> dict[str, dict[str, Any]]:
    """Fastest options by key, for bf16 and one head dim and tile on the current GPU."""
    q, k, v = (
        torch.randn(1, count, length, head_dim, dtype=torch.bfloat16, device="cuda")
        for count in (heads[0], heads[1], heads[1])
    )
    method = ControlledDensity(
        method=build_method("pbs", block_size=tile, segment_size=2 * tile, gqa="shared"),
        target_density=0.25,
    )
    plan = method.plan(q, k)
    shape = {
        "head_dim": head_dim,
        "element_size": 2,
        "query_tile": tile,
        "key_tile": tile,
        "capability": torch.cuda.get_device_capability(),
    }
    hopper = hopper_options(**shape)
    name, default = ("hopper", hopper) if hopper else ("triton", kernels.launch_options(**shape))
    best = fastest(list(candidates(default)), lambda o: _attend(q, k, v, plan, name, o), effort)
    return {tuned.key_of(name, shape): best._asdict()}


def fastest(options: list[Options], attend: Callable[[Options], Tensor], effort: Effort) -> Options:
    """The option with the smallest median among those that agree with the first."""
    expected = attend(options[0])
    correct = {}
    for option in options:
        try:
            error = (attend(option) - expected).abs().max().item()
        except VARIANT_ERRORS as failure:
            print(f"  {option}: {type(failure).__name__}")  # noqa: T201 - progress of a tool
            continue
        if error <= TOLERANCE:
            correct[str(option)] = option
    calls = {name: lambda _, o=option: attend(o) for name, option in correct.items()}
    times = time_interleaved(calls, device=expected.device, effort=effort)
    found = {name: time for name, time in times.items() if isinstance(time, Timing)}
    medians = {name: time.median_ms for name, time in found.items()}
    for name, time in found.items():
        low, high = min(time.samples_ms), max(time.samples_ms)
        spread = f"{low:.3f} to {high:.3f}, {len(time.samples_ms)} calls"
        print(f"  {name}: {medians[name]:.3f} ms ({spread})")  # noqa: T201 - progress of a tool
    return correct[min(medians, key=medians.__getitem__)]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, name: str, options: Options
) -> Tensor:
    """One call with these options in place of what the table or the package says."""
    original = kernels.tuned

    def chosen(kernel: str, shape: dict[str, Any], default: Any) -> Any:  # noqa: ARG001
        return options if kernel == name else default

    kernels.tuned = chosen
    try:
        return kernels.block_sparse_attention(q, k, v, plan, scale=q.shape[3] ** -0.5)
    finally:
        kernels.tuned = original


def main(arguments: list[str] | None = None) -> None:
    """Tune and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--tiles", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--out", type=Path, default=tuned.table_path())
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device; launch options are measured on the GPU they are for")
    table = json.loads(options.out.read_text()) if options.out.exists() else {}
    for head_dim in options.head_dims:
        for tile in options.tiles:
            print(f"D={head_dim} tile={tile}")  # noqa: T201 - progress of a tool
            table |= tune(
                head_dim, tile, length=options.length, heads=(32, 8), effort=Effort(seconds=5)
            )
            write_atomically(options.out, to_json(table, indent=1) + "\n")


if __name__ == "__main__":
    main()

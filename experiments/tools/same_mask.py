"""The same tiles through other people's kernels: PyTorch's FlexAttention beside ours, in turns.

    python -m experiments.tools.same_mask OUT.json --lengths 8192 32768 131072
    python -m experiments.tools.same_mask OUT.json --lengths 512 --device cpu --shape 4/2/32

Random tiles at the paper's density (Table 5), each query tile's own among them, keys in their
natural order: a mask that every block-sparse kernel can take. Building a kernel's own form of the
mask is not timed, nor is compiling. No time is given for an output that has not just matched exact
attention on sampled rows. Needs no hydra and no wandb.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from experiments.gate.rows import check_rows
from experiments.report.markdown import to_markdown
from experiments.settings.environment import describe_environment
from experiments.timing.cost_model import Shape
from experiments.timing.densities import ControlledDensity
from experiments.timing.inputs import Cell, draw_inputs
from experiments.timing.published import density_at
from experiments.timing.stopwatch import Effort, Failure, Timing, time_interleaved
from pbs import build_method
from pbs.ops.block_sparse_attention import block_sparse_attention
from pbs.ops.plan import AttentionPlan

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every kernel at every length, write all samples, print a table."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tools.same_mask")
    parser.add_argument("out", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--density", type=float, help="default: the paper's at each length")
    parser.add_argument("--shape", default="32/8/128", help="query heads/key heads/head dim")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu tries the script")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = Shape.parse(options.shape, element_size=dtype.itemsize)
    records = []
    for length in options.lengths:
        density = options.density or density_at(length)[0]
        cell = Cell(shape, length, dtype, device, "random", density)
        records.append({**cell.describe(), "kernels": measure(cell, options.rounds)})
    results = {"environment": describe_environment(), "records": records}
    options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(to_markdown(table(records)))  # noqa: T201 - what was asked for


@torch.inference_mode()
def measure(cell: Cell, rounds: int) -> dict[str, dict[str, Any]]:
    """Times of each kernel on one plan, by name, with its error."""
    ((q, k, v),) = draw_inputs(cell)
    method = ControlledDensity(
        method=build_method("meanpool"), target_density=cell.density or 1.0, seed=cell.seed
    )
    plan = method.plan(q, k, scale=cell.scale)
    found: dict[str, dict[str, Any]] = {}
    kernels: dict[str, Kernel] = {}
    for name, make in makers(cell).items():
        try:
            kernel = make(plan, cell.scale)
            check = check_rows(kernel(q, k, v), q, k, v, plan, scale=cell.scale, seed=cell.seed)
        except Exception as error:  # noqa: BLE001 - other people's kernels refuse in many ways
            found[name] = Failure.of_variant(error, is_dense=True).to_dict()
            continue
        if check.passed:
            kernels[name] = kernel
            found[name] = {
                "relative_error": check.relative,
                "density": float(plan.density().mean()),
            }
        else:
            found[name] = Failure("incorrect", str(check)).to_dict()
    times = time_interleaved(
        {name: partial(_call, kernel, q, k, v) for name, kernel in kernels.items()},
        device=cell.device,
        effort=Effort(min_rounds=rounds, max_rounds=rounds),
        holds=True,
    )
    for name, time in times.items():
        found[name] = (
            {**found[name], **time.to_dict()} if isinstance(time, Timing) else time.to_dict()
        )
    return found


def _call(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, _: int) -> Tensor:
    return kernel(q, k, v)


def makers(cell: Cell) -> dict[str, Callable[[AttentionPlan, float], Kernel]]:
    """What makes each kernel, for a plan and a factor of the logits."""
    ours = {"ours": "auto"}
    if cell.device.type == "cuda":
        ours["ours, Triton"] = "triton"
    return {
        **{name: partial(_ours, backend) for name, backend in ours.items()},
        "FlexAttention": _flex,
    }


def _ours(backend: str, plan: AttentionPlan, scale: float) -> Kernel:
    return lambda q, k, v: block_sparse_attention(q, k, v, plan, scale=scale, backend=backend)


def _flex(plan: AttentionPlan, scale: float) -> Kernel:
    """PyTorch's FlexAttention."""
    from torch.nn.attention.flex_attention import flex_attention

    mask = flex_mask(plan)
    # Not compiled it would compute all tiles, and ask the rule of the mask alone.
    function = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: function(q, k, v, block_mask=mask, scale=scale, enable_gqa=True)


def flex_mask(plan: AttentionPlan) -> BlockMask:
    """A plan as FlexAttention takes it: whole tiles as full blocks, each query tile's own causal.

    Raises:
        NotImplementedError: keys have moved, or there are more windows than the own tile.
    """
    from torch.nn.attention.flex_attention import BlockMask

    grid, heads = plan.grid, (1, plan.num_heads)
    if plan.order is not None or plan.windows.shape[-1] != 1:
        raise NotImplementedError("FlexAttention gets plans in natural order with one window alone")

    def causal(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    def listed(tiles: Tensor) -> Tensor:
        """It wants room for all key tiles in its lists."""
        tiles = tiles.expand(*heads, -1, -1).int()
        return pad(tiles, (0, grid.num_key_tiles - tiles.shape[-1])).contiguous()

    own = listed(plan.windows // grid.key_tile)
    mask: BlockMask = BlockMask.from_kv_blocks(
        torch.ones_like(own[..., 0]),
        own,
        plan.num_blocks.expand(*heads, -1).int().contiguous(),
        listed(plan.blocks),
        BLOCK_SIZE=(grid.query_tile, grid.key_tile),
        mask_mod=causal,
        seq_lengths=(grid.num_queries, grid.num_keys),
        compute_q_blocks=False,
    )
    return mask


def table(records: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """A row a length; ours over each other kernel is the ratio of medians."""
    columns: dict[str, list[str]] = {}
    for record in records:
        cells = {"tokens": str(record["length"]), "density": f"{record['target_density']:.3f}"}
        ours = record["kernels"]["ours"]["median_ms"]
        for name, entry in record["kernels"].items():
            time = entry["median_ms"]
            cells[f"{name}, ms"] = f"{time:.2f}" if time is not None else entry["failure"]
            if name != "ours":
                known = time is not None and ours is not None
                cells[f"ours over {name}"] = f"{time / ours:.2f}x" if known else ""
        for column, cell in cells.items():
            columns.setdefault(column, []).append(cell)
    return columns


if __name__ == "__main__":
    main()

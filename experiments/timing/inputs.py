"""What one attention call is timed on: a cell's sizes, and its q, k and v.

Importable without hydra and wandb. Legend: see :mod:`pbs.ops.grid`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.timing.cost_model import Shape
from pbs.testing import make_qkv

Record = dict[str, Any]
Inputs = tuple[Tensor, Tensor, Tensor]

# Elements of q up to which all heads are drawn; above it one group is, the others are its turns.
MAX_DRAWN = 1 << 23


@dataclass(frozen=True)
class Cell:
    """What is measured.

    Args:
        shape: heads.
        length: N, queries and keys.
        dtype: of q, k, v.
        device: where.
        structure: of the inputs: "random", "vertical", "slash" or "mixed".
        density: share of the tiles that every method computes; None: what it selects itself.
        seed: of inputs and tiles.
        sharpness: factor of drawn queries. The larger, the fewer keys hold most of a query's
            attention, and the fewer tiles a method selects by itself.
    """

    shape: Shape
    length: int
    dtype: torch.dtype
    device: torch.device
    structure: str = "mixed"
    density: float | None = None
    seed: int = 0
    sharpness: float = 1.0

    @property
    def scale(self) -> float:
        """Factor of the logits."""
        return float(self.shape.head_dim**-0.5)

    def describe(self) -> Record:
        """The columns that name the cell."""
        return {
            "length": self.length,
            "q_heads": self.shape.q_heads,
            "kv_heads": self.shape.kv_heads,
            "head_dim": self.shape.head_dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "structure": self.structure,
            "sharpness": self.sharpness,
            "target_density": self.density,
        }


def draw_inputs(cell: Cell, *, num_sets: int = 1) -> list[Inputs]:
    """Sets of q, k and v of a cell.

    Noise is drawn on the device. Up to ``MAX_DRAWN`` elements of q, other structures are
    :func:`pbs.testing.make_qkv`'s. Above, that draws the heads of one key/value group, and groups
    and sets are turned copies of it (dimensions permuted and signs flipped, alike in q and k: same
    attention, other numbers) with values of their own.
    """
    sets = _draw(cell, num_sets)
    if cell.sharpness != 1.0:
        for q, _, _ in sets:
            q *= cell.sharpness
    return sets


def _draw(cell: Cell, num_sets: int) -> list[Inputs]:
    shape = cell.shape
    seeds = [cell.seed + 1000 * index for index in range(num_sets)]
    if cell.structure == "random":
        return [_noise(cell, seed) for seed in seeds]
    options: dict[str, Any] = {
        "structure": cell.structure,
        "dtype": cell.dtype,
        "device": cell.device,
    }
    sizes = cell.length, shape.head_dim
    if shape.q_heads * shape.head_dim * cell.length <= MAX_DRAWN:
        drawn = [
            make_qkv(1, shape.q_heads, shape.kv_heads, *sizes, seed=seed, **options)
            for seed in seeds
        ]
        return [(one.q, one.k, one.v) for one in drawn]
    one = make_qkv(1, shape.q_heads // shape.kv_heads, 1, *sizes, seed=cell.seed, **options)
    return [_turned(one.q, one.k, cell, seed) for seed in seeds]


def draw_sets(cell: Cell, count: int) -> list[Inputs]:
    """Sets of inputs, as many as a quarter of the free memory holds, at least one."""
    if cell.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(cell.device)
        count = min(count, int(0.25 * free / cell.shape.input_bytes(cell.length)))
    return draw_inputs(cell, num_sets=max(1, count))


def _turned(q: Tensor, k: Tensor, cell: Cell, seed: int) -> Inputs:
    """All heads from those of one group."""
    inputs = _empty(cell)
    groups = q.shape[1]
    generator = torch.Generator().manual_seed(seed)
    for head in range(cell.shape.kv_heads):
        dims = torch.randperm(cell.shape.head_dim, generator=generator).to(cell.device)
        signs = torch.randint(0, 2, (cell.shape.head_dim,), generator=generator) * 2 - 1
        signs = signs.to(device=cell.device, dtype=cell.dtype)
        inputs[0][:, head * groups : (head + 1) * groups] = q[..., dims] * signs
        inputs[1][:, head : head + 1] = k[..., dims] * signs
    inputs[2].normal_(generator=torch.Generator(cell.device).manual_seed(seed))
    return inputs


def _noise(cell: Cell, seed: int) -> Inputs:
    """Unit noise drawn on the device."""
    generator = torch.Generator(cell.device).manual_seed(seed)
    q, k, v = _empty(cell)
    return tuple(x.normal_(generator=generator) for x in (q, k, v))  # type: ignore[return-value]


def _empty(cell: Cell) -> Inputs:
    shape = cell.shape
    sizes = (shape.q_heads, shape.kv_heads, shape.kv_heads)
    return tuple(  # type: ignore[return-value]
        torch.empty(1, h, cell.length, shape.head_dim, dtype=cell.dtype, device=cell.device)
        for h in sizes
    )

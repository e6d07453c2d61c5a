"""The gate before every time: sampled rows of an output against exact attention over the plan.

Works at any length: only the sampled rows are computed, over the keys that the plan names for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.gate.coverage import sample_rows
from experiments.gate.head_plan import HeadPlan
from pbs.ops.block_sparse_attention import AS_GIVEN, block_sparse_attention
from pbs.ops.grid import BlockGrid
from pbs.ops.plan import AttentionPlan

# Allowed: this many times the error of eager attention in the same dtype, and a rounding band. One
# row is one draw of rounding errors, so a lucky reference must not fail a sound kernel.
FACTOR = 4.0
BAND = 4.0
# Largest ‖out - exact‖ / ‖exact‖: one tile left out of hundreds exceeds it.
MAX_RELATIVE = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-4}
# In eight bits: times that of their emulation over the same rows, which rounds in another order.
FACTOR_OF_EIGHT_BITS = 1.5


@dataclass(frozen=True)
class RowCheck:
    """Errors of an output over sampled rows.

    Attributes:
        error: largest absolute difference to exact attention; infinite for NaN.
        allowed: largest that passes.
        relative: ‖out - exact‖ / ‖exact‖ over all sampled rows.
        allowed_relative: largest that passes.
        num_rows: rows compared, over all heads.
        num_bad: elements of the whole output that are NaN or infinite.
    """

    error: float
    allowed: float
    relative: float
    allowed_relative: float
    num_rows: int
    num_bad: int

    @property
    def passed(self) -> bool:
        """Within the budget, and everything written."""
        is_close = self.error <= self.allowed and self.relative <= self.allowed_relative
        return self.num_bad == 0 and is_close

    def __str__(self) -> str:
        return (
            f"error {self.error:.3g} (allowed {self.allowed:.3g}), relative {self.relative:.3g} "
            f"(allowed {self.allowed_relative:.3g}), {self.num_bad} elements NaN or infinite, "
            f"{self.num_rows} rows compared"
        )


def check_rows(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan | None,
    *,
    scale: float,
    heads: Sequence[int] | None = None,
    num_rows: int = 16,
    seed: int = 0,
    precision: str = AS_GIVEN,
) -> RowCheck:
    """Compare rows of an output with exact attention.

    Args:
        out: what was computed, ``[Z, Hq, Nq, D]``.
        q: ``[Z, Hq, Nq, D]``.
        k: ``[Z, Hkv, Nk, D]``.
        v: ``[Z, Hkv, Nk, D]``.
        plan: the keys of every row; None or a dense plan: all up to the row's own.
        scale: factor of the logits.
        heads: query heads to compare; default all.
        num_rows: rows of each head, spread over the queries, the last one among them.
        seed: of the draw of rows.
        precision: of the method; what is allowed is then the error of eager attention in it.
    """
    heads = range(q.shape[1]) if heads is None else heads
    rows = sample_rows(q.shape[2], min(num_rows, q.shape[2]), seed=seed)
    groups = q.shape[1] // k.shape[1]
    error = budget = largest = 0.0
    difference = rounding = norm = 0.0
    for sequence in range(q.shape[0]):
        for head in heads:
            named = _named_keys(plan, sequence, head, rows, q, k)
            keys, values = k[sequence, head // groups], v[sequence, head // groups]
            for row, index in zip(rows, named, strict=True):
                parts = q[sequence, head, row], keys[index], values[index]
                exact = _attend(*(part.double() for part in parts), scale)
                rounded = _attend_in(precision, *parts, scale).double()
                delta = (out[sequence, head, row].double() - exact).nan_to_num(nan=float("inf"))
                error = max(error, float(delta.abs().max()))
                budget = max(budget, float((rounded - exact).abs().max()))
                largest = max(largest, float(exact.abs().max()))
                difference += float(delta.square().sum())
                rounding += float((rounded - exact).square().sum())
                norm += float(exact.square().sum())
    allowed = MAX_RELATIVE.get(out.dtype, 1e-9)
    if precision != AS_GIVEN:
        allowed = FACTOR_OF_EIGHT_BITS * (rounding / max(norm, 1e-300)) ** 0.5
    return RowCheck(
        error=error,
        allowed=FACTOR * budget + BAND * torch.finfo(out.dtype).eps * largest,
        relative=(difference / max(norm, 1e-300)) ** 0.5,
        allowed_relative=allowed,
        num_rows=q.shape[0] * len(heads) * len(rows),
        num_bad=sum(int((~part.isfinite()).sum()) for part in out.flatten(0, 1)),
    )


def _named_keys(
    plan: AttentionPlan | None,
    sequence: int,
    head: int,
    rows: Sequence[int],
    q: Tensor,
    k: Tensor,
) -> list[Tensor]:
    """Positions of the keys of each row, int64."""
    offset = k.shape[2] - q.shape[2]
    if plan is None or plan.is_dense:
        return [torch.arange(row + offset + 1, device=q.device) for row in rows]
    lists = HeadPlan.of(plan, sequence, head)
    tiles = lists.tiles_of(torch.tensor(rows, device=q.device))
    found = []
    for row, tile in zip(rows, tiles.tolist(), strict=True):
        window = lists.window_keys(tile, k.shape[2])
        position = torch.tensor([row + offset], device=q.device)
        seen = window[lists.sees(position, window)[0]]
        found.append(torch.cat([lists.whole_keys(tile), seen]))
    return found


def _attend_in(precision: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """As :func:`_attend`, in a method's precision."""
    if precision == AS_GIVEN:
        return _attend(q, k, v, scale)
    # One query that sees all the keys there are.
    grid = BlockGrid(1, len(k), 128, 128)
    plan = AttentionPlan.dense(grid, 1, 1, device=q.device, reason="all keys")
    settings = {"scale": scale, "backend": "reference", "precision": precision}
    return block_sparse_attention(
        q[None, None, None], k[None, None], v[None, None], plan, **settings
    )[0, 0, 0]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of one query ``[D]`` over some keys and values ``[L, D]``, in their dtype."""
    return ((k @ q) * scale).softmax(dim=0) @ v

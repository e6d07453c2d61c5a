"""XAttention: antidiagonal block scores. Legend: see :mod:`pbs.ops.grid`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pbs.checks import check_block_size, check_choice, check_table
from pbs.methods.base import AttentionMethod, Call, Knob
from pbs.methods.facts import Facts, at
from pbs.ops.antidiagonal import antidiagonal_block_sums, query_groups
from pbs.ops.block_selection import select_top_p_blocks
from pbs.ops.grid import BlockGrid, candidate_tiles
from pbs.ops.plan import AttentionPlan
from pbs.selectors.antidiagonal import check_stride


@dataclass(kw_only=True)
class XAttention(AttentionMethod):
    """Fewest blocks whose antidiagonal mass, with sink and diagonal, reaches τ.

    Args:
        block_size: B, a power of two of at least 16.
        stride: s, divides B; larger is cheaper and coarser.
        threshold: share of each row's mass to reach (τ), in [0, 1]; 1 equals dense. A number, a
            list of one per query head, or a list of such lists, one per layer. 0 keeps only sink
            and diagonal.
        first_chunk: "minimal" follows the paper everywhere; "reference" reproduces the original
            code's rule for the rows of its first chunk, which keeps one block more than needed.

    Source: arXiv 2503.16428, Algorithm 1; reference code mit-han-lab/x-attention.
    """

    knob = Knob("threshold", low=0.0, high=1.0)
    facts = Facts(
        "XAttention", "#CC79A7", "v", selection="antidiagonal", curve=at("threshold", 0.5, 0.7, 0.9)
    )

    block_size: int = 128
    stride: int = 8
    threshold: Any = 0.9
    first_chunk: str = "minimal"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block_size(self.block_size)
        check_stride(self.stride)
        if self.block_size % self.stride:
            raise ValueError(
                f"stride must divide block_size, got {self.stride} and {self.block_size}; try 8"
            )
        check_choice(self.first_chunk, ("minimal", "reference"), name="first_chunk")
        self._thresholds = _threshold_tensor(self.threshold)

    def check_model(self, *, num_layers: int, num_heads: int | None) -> None:
        """See the base class: the thresholds' layers and heads are the model's."""
        sizes = tuple(self._thresholds.shape)
        check_table("the list of thresholds", sizes, num_layers=num_layers, num_heads=num_heads)

    def densest(self) -> AttentionMethod:
        """See the base class: a per-head threshold too becomes 1 everywhere."""
        return XAttention(
            backend=self.backend, block_size=self.block_size, stride=self.stride, threshold=1.0
        )

    def select(self, call: Call) -> AttentionPlan:
        """See the base class."""
        q, k, scale = call.q, call.k, call.scale
        grid = call.grid(self.block_size)
        threshold = self._threshold_of(call.layer_idx, q.shape[1]).to(q.device)
        sums = antidiagonal_block_sums(q, k, stride=self.stride, scale=scale, grid=grid)
        total = query_groups(grid, self.stride, q.device).float()
        if self.first_chunk != "reference" and self._thresholds.ndim == 0:
            level = float(self._thresholds)  # on the CPU: no wait for the device
            if 0 < level < 1:
                return _plan_of_shares(sums / total, level, grid)
        tiles = torch.arange(grid.num_key_tiles, device=q.device)
        diagonal = _diagonal(grid, q.device)
        forced = diagonal | (tiles == 0)
        mask = _select(sums, forced, threshold * total, skipped=0)
        if self.first_chunk == "reference":
            quirk = _select(sums, diagonal, threshold * total, skipped=1)
            rows = torch.arange(grid.num_query_tiles, device=q.device)
            in_first = rows < _first_chunk_tokens(grid.num_queries) // self.block_size
            mask = torch.where(in_first[:, None], quirk, mask)
        return AttentionPlan.from_block_mask(mask | forced | (threshold >= 1), grid)

    def _threshold_of(self, layer_idx: int | None, num_heads: int) -> Tensor:
        """The threshold of each head of this layer, fp32 ``[Hq or 1, 1, 1]``."""
        thresholds = self._thresholds
        if thresholds.ndim == 2:
            if layer_idx is None or not 0 <= layer_idx < len(thresholds):
                raise ValueError(
                    f"threshold has one row per layer ({len(thresholds)}), got "
                    f"layer_idx={layer_idx}; pass layer_idx, or a threshold per head"
                )
            thresholds = thresholds[layer_idx]
        if thresholds.ndim == 1 and len(thresholds) != num_heads:
            raise ValueError(
                f"expected one threshold per query head ({num_heads}), got {len(thresholds)}"
            )
        return thresholds.reshape(-1, 1, 1)


def _plan_of_shares(shares: Tensor, threshold: float, grid: BlockGrid) -> AttentionPlan:
    """The first block, the diagonal, and the largest others until the threshold is reached.

    As :func:`_select` for one threshold, without a sort where there is a kernel for it.
    """
    _, limits = candidate_tiles(grid, shares.device)
    blocks, num_blocks = select_top_p_blocks(
        shares,
        threshold=threshold,
        candidates=grid.last_positions(shares.device) // grid.key_tile + 1,
        limits=limits,
        forced=torch.zeros(1, 1, dtype=torch.int64, device=shares.device),
        covered=torch.zeros_like(shares[..., 0]),
    )
    return AttentionPlan.from_lists(blocks, num_blocks, grid)


def _select(sums: Tensor, forced: Tensor, goal: Tensor, *, skipped: int) -> Tensor:
    """Blocks to add to the forced ones, largest first, until the goal is reached.

    A block is taken iff the forced mass plus that of the blocks before it is below the goal. With
    ``skipped`` 1 the block just before it does not count yet, and the first is always taken.
    """
    forced_mass = sums.masked_fill(~forced, 0.0).sum(-1, keepdim=True)
    others = sums.masked_fill(forced, -1.0)
    ranked, index = others.sort(dim=-1, descending=True, stable=True)
    counted = ranked.clamp(min=0.0).cumsum(dim=-1)
    before = torch.nn.functional.pad(counted[..., :-1], (1, 0))
    if skipped:
        before = torch.nn.functional.pad(before[..., :-1], (1, 0))
    keep = forced_mass + before < goal
    if skipped:
        keep[..., :1] = True
    selected = torch.zeros_like(sums, dtype=torch.bool)
    return selected.scatter_(-1, index, keep)


def _diagonal(grid: BlockGrid, device: torch.device) -> Tensor:
    """Key tiles that the positions of a query tile touch, bool ``[Tq, Tk]``."""
    tiles = torch.arange(grid.num_key_tiles, device=device)
    first = grid.first_positions(device) // grid.key_tile
    last = grid.last_positions(device) // grid.key_tile
    return (tiles >= first[:, None]) & (tiles <= last[:, None])


def _first_chunk_tokens(num_queries: int) -> int:
    """Size of the original's first chunk: a whole prompt up to 16K, then less, at least 2K."""
    padded = 1 << (num_queries - 1).bit_length()
    return max(2048, min(padded, (1 << 28) // padded))


def _threshold_tensor(threshold: Any) -> Tensor:
    """fp32 scalar, ``[Hq]`` or ``[layers, Hq]``."""
    if isinstance(threshold, bool):
        raise TypeError(
            f"threshold must be a number in [0, 1], got {threshold}; 1 keeps every block"
        )
    try:
        values = torch.as_tensor(threshold, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            "threshold must be a number, a list of one per head, or a list of such lists of equal "
            f"length, one per layer; got {threshold!r}"
        ) from error
    if values.ndim > 2 or not values.numel():
        raise ValueError(
            "threshold must be a number, [heads] or [layers][heads], got shape "
            f"{tuple(values.shape)}"
        )
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(f"threshold must lie in [0, 1], got {threshold}; 1 keeps every block")
    return values

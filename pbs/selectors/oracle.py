"""The true attention mass of each block: the best any selector can know."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from pbs.ops.grid import BlockGrid
from pbs.selectors.base import Selector


@dataclass(kw_only=True)
class OracleSelector(Selector):
    """Mean over the block's queries of their attention to each candidate block, exact.

    Costs as much as dense attention: an upper bound for experiments, not a method. Works on one
    query block of one head at a time, so that memory grows with N, not with N².
    """

    def block_probabilities(
        self, q: Tensor, k: Tensor, *, scale: float, grid: BlockGrid, candidates: Tensor
    ) -> Tensor:
        """See the base class."""
        groups = q.shape[1] // k.shape[1]
        padding = grid.num_key_tiles * grid.key_tile - grid.num_keys
        mass = q.new_zeros(
            *q.shape[:2], grid.num_query_tiles, grid.num_key_tiles, dtype=torch.float32
        )
        for tile in range(grid.num_query_tiles):
            allowed = candidates[tile]
            if not bool(allowed.any()):
                continue
            rows = q[:, :, tile * grid.query_tile : (tile + 1) * grid.query_tile]
            keys_allowed = allowed.repeat_interleave(grid.key_tile)[: grid.num_keys]
            for head in range(q.shape[1]):
                logits = rows[:, head].float() @ k[:, head // groups].float().transpose(-1, -2)
                logits.mul_(scale).masked_fill_(~keys_allowed, float("-inf"))
                weights = pad(logits.softmax(dim=-1).mean(dim=1), (0, padding))
                mass[:, head, tile] = weights.unflatten(-1, (-1, grid.key_tile)).sum(-1)
        return mass

"""The exact attention mass of each block: the best any selector can know."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from pbs.checks import check_choice
from pbs.ops.grid import BlockGrid
from pbs.selectors.base import Selector
from pbs.selectors.own import NORMALISERS, OwnKeys


@dataclass(kw_only=True)
class OracleSelector(Selector):
    """Mean over the block's queries of their attention to each candidate block, exact.

    Costs as much as dense attention: an upper bound for experiments, not a method. Works on one
    query block of one head at a time, so that memory grows with N, not with N².

    Args:
        normaliser: "candidates": attention as it would be if a query saw them alone; the threshold
            is relative to what they hold. "causal": attention as it is. What a query's own segment
            and the forced block hold then counts as covered, and the threshold is the coverage that
            each query block reaches at least, with the fewest blocks.
    """

    normaliser: str = "candidates"

    def __post_init__(self) -> None:
        check_choice(self.normaliser, NORMALISERS, name="normaliser")

    def block_probabilities(
        self, q: Tensor, k: Tensor, *, scale: float, grid: BlockGrid, candidates: Tensor
    ) -> Tensor:
        """See the base class; with normaliser "causal" see :meth:`block_scores`."""
        return self.block_scores(q, k, scale=scale, grid=grid, candidates=candidates, own=None)[0]

    def block_scores(
        self,
        q: Tensor,
        k: Tensor,
        *,
        scale: float,
        grid: BlockGrid,
        candidates: Tensor,
        own: OwnKeys | None,
    ) -> tuple[Tensor, Tensor | None]:
        """See the base class; own keys are credited with normaliser "causal"."""
        if self.normaliser == "candidates":
            own = None
        elif own is None:
            own = OwnKeys.after(candidates, k, grid)
        positions = None if own is None else own.positions(grid)
        groups = q.shape[1] // k.shape[1]
        padding = grid.num_key_tiles * grid.key_tile - grid.num_keys
        mass = q.new_zeros(
            *q.shape[:2], grid.num_query_tiles, grid.num_key_tiles, dtype=torch.float32
        )
        for tile in range(grid.num_query_tiles):
            allowed = candidates[tile]
            if not bool(allowed.any()):
                continue
            rows = slice(tile * grid.query_tile, (tile + 1) * grid.query_tile)
            keys_allowed = allowed.repeat_interleave(grid.key_tile)[: grid.num_keys]
            for head in range(q.shape[1]):
                queries = q[:, head, rows].float()
                logits = queries @ k[:, head // groups].float().transpose(-1, -2)
                logits.mul_(scale).masked_fill_(~keys_allowed, float("-inf"))
                if own is not None and positions is not None:
                    start = int(allowed.sum()) * grid.key_tile
                    keys = own.keys[:, head * own.keys.shape[1] // q.shape[1]]
                    seen = positions[:, head % positions.shape[1], rows]
                    beside = _own_logits(queries, keys[:, start : start + own.width], seen - start)
                    logits = torch.cat([logits, beside.mul_(scale)], dim=-1)
                weights = logits.softmax(dim=-1)[..., : grid.num_keys].mean(dim=1)
                weights = pad(weights, (0, padding))
                mass[:, head, tile] = weights.unflatten(-1, (-1, grid.key_tile)).sum(-1)
        if own is None:
            return mass, None
        return mass, (1 - mass.sum(dim=-1)).clamp(min=0.0)


def _own_logits(queries: Tensor, keys: Tensor, last: Tensor) -> Tensor:
    """Products of queries ``[Z, M, D]`` and keys ``[Z, W, D]``; -inf after each query's last key.

    ``last`` is the place of that key, int64 ``[1 or Z, M]``.
    """
    products = queries @ keys.float().transpose(-1, -2)
    places = torch.arange(keys.shape[1], device=keys.device)
    return products.masked_fill_(places > last.unsqueeze(-1), float("-inf"))

"""MeanPooling: PBS's block scores without its permutation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pbs.checks import check_block_size, check_choice, check_threshold
from pbs.methods.base import AttentionMethod, Call, Knob
from pbs.methods.facts import Facts, at
from pbs.ops.grid import candidate_tiles
from pbs.ops.plan import AttentionPlan
from pbs.ops.stages import stage
from pbs.selectors.meanpool import MeanPoolSelector


@dataclass(kw_only=True)
class MeanPooling(AttentionMethod):
    """Fewest blocks whose pooled probability reaches τ; the diagonal takes part in the softmax.

    Args:
        block_size: tokens per tile side (B), a power of two of at least 16.
        threshold: cumulative block probability to reach (τ), in (0, 1]; 1 equals dense.
        force_select_first_block: always compute block 0, the attention sink.
        pad_mean: mean of a partial last block over its "real" tokens, or zero-padded as in the
            original code ("reference").

    Source: the "MeanPooling" baseline of arXiv 2510.21270. The diagonal block is always computed.
    """

    knob = Knob("threshold", low=0.001, high=1.0)
    facts = Facts(
        "MeanPooling", "#0072B2", "s", selection="pooled", curve=at("threshold", 0.5, 0.7, 0.9)
    )

    block_size: int = 128
    threshold: float = 0.9
    force_select_first_block: bool = True
    pad_mean: str = "real"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block_size(self.block_size)
        check_threshold(self.threshold)
        check_choice(self.pad_mean, ("real", "reference"), name="pad_mean")
        self._selector = MeanPoolSelector(pad_mean=self.pad_mean)

    def select(self, call: Call) -> AttentionPlan:
        """See the base class."""
        q, k, scale = call.q, call.k, call.scale
        grid = call.grid(self.block_size)
        last_tile = grid.last_positions(q.device) // self.block_size
        causal = torch.arange(grid.num_key_tiles, device=q.device) <= last_tile[:, None]
        _, num_past = candidate_tiles(grid, q.device)
        first = torch.zeros(1, 1, dtype=torch.int64, device=q.device)
        with stage("selection"):
            blocks, num_blocks = self._selector.select(
                q,
                k,
                scale=scale,
                grid=grid,
                candidates=causal,
                num_candidates=last_tile + 1,
                limits=num_past,
                threshold=self.threshold,
                forced=first if self.force_select_first_block else None,
            )
        return AttentionPlan.from_lists(blocks, num_blocks, grid)

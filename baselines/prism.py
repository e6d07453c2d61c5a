"""Prism: block scores in two bands of rotary frequencies. Legend: see :mod:`pbs.ops.grid`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pbs.checks import check_block_size, check_choice, check_integer, check_threshold
from pbs.methods.base import AttentionMethod, Call, Knob
from pbs.methods.facts import Facts, at
from pbs.ops.block_selection import select_top_p
from pbs.ops.plan import AttentionPlan
from pbs.ops.pooling import mean_pool
from pbs.selectors.bands import band_dims, band_probabilities


@dataclass(kw_only=True)
class Prism(AttentionMethod):
    """The union of two selections: by the fast rotary dims (slashes) and by the slow ones (topics).

    Args:
        block_size: B, a power of two of at least 16.
        threshold: cumulative probability that each band reaches (p), in (0, 1]; 1 equals dense. The
            authors use 0.95 for Llama and 0.93 for Qwen.
        high_dims: dims of the fast band, even; None is half the head dim (64 of 128).
        low_dims: dims of the slow band, even; None is three quarters (96 of 128).
        rope_layout: "half" if dim x turns with dim x + D/2 (Llama, Qwen), "interleaved" if with its
            neighbour. A property of the model; the wrong one makes the bands meaningless.

    Source: arXiv 2602.08426; sink and diagonal are always computed.
    """

    knob = Knob("threshold", low=0.001, high=1.0)
    facts = Facts("Prism", "#999933", "h", selection="prism", curve=at("threshold", 0.5, 0.7, 0.9))

    block_size: int = 128
    threshold: float = 0.95
    high_dims: int | None = None
    low_dims: int | None = None
    rope_layout: str = "half"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block_size(self.block_size)
        check_threshold(self.threshold)
        for name in ("high_dims", "low_dims"):
            value = getattr(self, name)
            if value is not None:
                check_integer(value, name=name, smallest=2)
                if value % 2:
                    raise ValueError(f"{name} must be even (pairs of dims turn), got {value}")
        check_choice(self.rope_layout, ("half", "interleaved"), name="rope_layout")

    def select(self, call: Call) -> AttentionPlan:
        """See the base class."""
        q, k, scale = call.q, call.k, call.scale
        head_dim = q.shape[3]
        grid = call.grid(self.block_size)
        q_blocks, k_blocks = mean_pool(q, self.block_size), mean_pool(k, self.block_size)
        tiles = torch.arange(grid.num_key_tiles, device=q.device)
        causal = tiles <= (grid.last_positions(q.device) // self.block_size)[:, None]
        mask = (tiles == 0).expand(*q.shape[:2], *causal.shape)
        bands = {
            "high": head_dim // 2 if self.high_dims is None else self.high_dims,
            "low": head_dim * 3 // 4 if self.low_dims is None else self.low_dims,
        }
        for band, num_dims in bands.items():
            dims = band_dims(head_dim, num_dims, band=band, layout=self.rope_layout)
            probabilities = band_probabilities(
                q_blocks, k_blocks, dims=dims, scale=scale, candidates=causal
            )
            mask = mask | select_top_p(probabilities, threshold=self.threshold, candidates=causal)
        return AttentionPlan.from_block_mask(mask, grid)

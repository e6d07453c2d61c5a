"""Mean pooling: a block's mean stands for the block. Legend: see :mod:`pbs.ops.grid`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pbs.checks import check_choice
from pbs.ops.grid import BlockGrid
from pbs.selectors.base import Selector


@dataclass(kw_only=True)
class MeanPoolSelector(Selector):
    """softmax(q̄ k̄ᵀ scale) over the candidates, q̄ and k̄ the means of the blocks.

    Args:
        pad_mean: "real" takes the mean of a partial last block over its real tokens; "reference"
            divides by B as the original code does (zero padding, damped scores).

    Source: arXiv 2510.21270, section 3.3 and Algorithm 2.
    """

    pad_mean: str = "real"

    def __post_init__(self) -> None:
        check_choice(self.pad_mean, ("real", "reference"), name="pad_mean")

    def block_probabilities(
        self, q: Tensor, k: Tensor, *, scale: float, grid: BlockGrid, candidates: Tensor
    ) -> Tensor:
        """See the base class."""
        q_blocks = mean_pool(q, grid.query_tile, pad_mean=self.pad_mean)
        k_blocks = mean_pool(k, grid.key_tile, pad_mean=self.pad_mean)
        return softmax_over(block_logits(q_blocks, k_blocks) * scale, candidates)


def mean_pool(x: Tensor, tile: int, *, pad_mean: str = "real") -> Tensor:
    """Mean of each tile of tokens, fp32 ``[Z, H, T, D]`` from ``[Z, H, N, D]``."""
    num_tokens = x.shape[2]
    num_tiles = -(-num_tokens // tile)
    remainder = num_tokens - (num_tiles - 1) * tile
    whole = x[:, :, : num_tokens // tile * tile].unflatten(2, (-1, tile))
    means = whole.mean(dim=3, dtype=torch.float32)
    if remainder == tile:
        return means
    count = tile if pad_mean == "reference" else remainder
    last = x[:, :, -remainder:].sum(dim=2, keepdim=True, dtype=torch.float32) / count
    return torch.cat([means, last], dim=2)


def block_logits(q_blocks: Tensor, k_blocks: Tensor) -> Tensor:
    """q kᵀ of pooled blocks, ``[Z, Hq, Tq, Tk]`` from ``[Z, Hq, Tq, D]`` and ``[Z, Ho, Tk, D]``."""
    groups = q_blocks.shape[1] // k_blocks.shape[1]
    grouped = q_blocks.unflatten(1, (k_blocks.shape[1], groups))
    return (grouped @ k_blocks.unsqueeze(2).transpose(-1, -2)).flatten(1, 2)


def softmax_over(logits: Tensor, candidates: Tensor) -> Tensor:
    """fp32 softmax over the candidates of each row; 0 elsewhere and in rows without candidates."""
    logits = logits.float().masked_fill(~candidates, float("-inf"))
    return logits.softmax(dim=-1).masked_fill(~candidates, 0.0)

"""Antidiagonal sampling: every stride x stride square is scored by its antidiagonal.

Legend: see :mod:`pbs.ops.grid`; s stride, a group is s consecutive tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from pbs.checks import check_choice
from pbs.ops.grid import BlockGrid
from pbs.selectors.base import Selector

# Logits held at once, over all sequences and heads: 64 MiB in fp32, and as much for their softmax.
MAX_LOGITS = 1 << 24


@dataclass(kw_only=True)
class AntidiagonalSelector(Selector):
    """XAttention's scores, here over the candidate blocks (PBS-Attn+ on permuted keys).

    Args:
        stride: s; must divide the block size. Larger is cheaper and coarser: 1 / (2 s) of dense.
        normaliser: softmax over the "candidates" only, or over all "causal" groups, so that what
            the own segment holds counts as covered.

    Source: arXiv 2503.16428, section 3; on permuted keys arXiv 2510.21270, PBS-Attn+. The paper
    does not say which normaliser it uses.
    """

    stride: int = 8
    normaliser: str = "candidates"

    def __post_init__(self) -> None:
        check_stride(self.stride)
        check_choice(self.normaliser, ("candidates", "causal"), name="normaliser")

    def block_probabilities(
        self, q: Tensor, k: Tensor, *, scale: float, grid: BlockGrid, candidates: Tensor
    ) -> Tensor:
        """See the base class; with normaliser "causal" rows sum to less than 1."""
        allowed = candidates if self.normaliser == "candidates" else None
        sums = antidiagonal_block_sums(
            q, k, stride=self.stride, scale=scale, grid=grid, allowed=allowed
        )
        return sums.masked_fill(~candidates, 0.0) / query_groups(grid, self.stride, q.device)


def check_stride(stride: int) -> None:
    """A positive integer."""
    if isinstance(stride, bool) or not isinstance(stride, int):
        raise TypeError(f"stride must be an integer, got {stride!r}")
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}; the papers use 8 and 16")


def query_groups(grid: BlockGrid, stride: int, device: torch.device) -> Tensor:
    """Query groups with a real token in each query tile, int64 ``[Tq, 1]``."""
    starts = torch.arange(grid.num_query_tiles, device=device) * grid.query_tile
    tokens = (grid.num_queries - starts).clamp(max=grid.query_tile)
    return ((tokens + stride - 1) // stride)[:, None]


def antidiagonal_block_sums(
    q: Tensor,
    k: Tensor,
    *,
    stride: int,
    scale: float,
    grid: BlockGrid,
    allowed: Tensor | None = None,
) -> Tensor:
    """Sum of the group probabilities in each block.

    The score of query group g and key group f is the mean over the antidiagonal of their s x s
    square, ``sum_t q[g s + s - 1 - t] k[f s + t] scale / s``; a partial group is filled with zeros.
    The softmax over f is in fp32. Chunked over query tiles: at most ``MAX_LOGITS`` logits (or those
    of one tile) are in memory.

    Args:
        q: ``[Z, Hq, Nq, D]``.
        k: ``[Z, Ho, Nk, D]``.
        stride: s, divides both tiles.
        scale: factor of the logits.
        grid: the blocks.
        allowed: key blocks that take part in the softmax, bool ``[Tq, Tk]``; None: every key group
            that starts at or before the query group's last token (causal on groups).

    Returns:
        fp32 ``[Z, Hq, Tq, Tk]``; a row sums to its number of real query groups.

    Raises:
        ValueError: the stride does not divide the tiles.

    Source: arXiv 2503.16428, Algorithm 1.
    """
    if grid.query_tile % stride or grid.key_tile % stride:
        raise ValueError(
            f"stride must divide the block size, got stride {stride} and block size "
            f"{grid.query_tile}; try 8 or 16"
        )
    batch, num_heads = q.shape[:2]
    groups = num_heads // k.shape[1]
    k = _pad_tokens(k, grid.num_key_tiles * grid.key_tile)
    k = k.unflatten(2, (-1, stride)).flatten(3).unsqueeze(2)
    per_tile = grid.query_tile // stride
    num_rows = grid.num_query_tiles * per_tile
    key_starts = torch.arange(k.shape[3], device=q.device) * stride
    last_rows = (torch.arange(num_rows, device=q.device) + 1) * stride - 1
    last_positions = (last_rows + grid.offset).clamp(max=grid.num_keys - 1)
    real_groups = -(-grid.num_queries // stride)
    step = max(1, MAX_LOGITS // (batch * num_heads * per_tile * k.shape[3]))
    sums = q.new_empty(
        batch, num_heads, grid.num_query_tiles, grid.num_key_tiles, dtype=torch.float32
    )
    for tile in range(0, grid.num_query_tiles, step):
        rows = slice(tile * per_tile, min((tile + step) * per_tile, num_rows))
        tokens = q[:, :, rows.start * stride : rows.stop * stride]
        tokens = _pad_tokens(tokens, (rows.stop - rows.start) * stride)
        # [Z, Ho, G, groups, s D], the queries of a group reversed.
        reverse = tokens.unflatten(2, (-1, stride)).flip(3).flatten(3)
        reverse = reverse.unflatten(1, (k.shape[1], groups))
        # Key tiles after the chunk's last position can have no probability.
        end = int(last_positions[rows.stop - 1]) // grid.key_tile + 1
        columns = slice(0, end * grid.key_tile // stride)
        logits = (reverse @ k[..., columns, :].transpose(-1, -2)).float()
        logits *= scale / stride
        if allowed is None:
            seen = key_starts[columns] <= last_positions[rows, None]
        else:
            seen = allowed[tile : tile + step, :end].repeat_interleave(per_tile, 0)
            seen = seen.repeat_interleave(grid.key_tile // stride, 1)
        logits.masked_fill_(~seen, float("-inf"))
        weights = logits.softmax(dim=-1).masked_fill_(~seen, 0.0)
        del logits
        if rows.stop > real_groups:
            weights[..., max(0, real_groups - rows.start) :, :] = 0.0
        tiled = weights.unflatten(-1, (end, -1)).unflatten(3, (-1, per_tile)).sum(dim=(4, 6))
        sums[:, :, tile : tile + step, :end] = tiled.flatten(1, 2)
        sums[:, :, tile : tile + step, end:] = 0.0
    return sums


def _pad_tokens(x: Tensor, num_tokens: int) -> Tensor:
    """Zeros after the last token, without a copy if there is nothing to add."""
    missing = num_tokens - x.shape[2]
    return pad(x, (0, 0, 0, missing)) if missing else x

"""The public functions. Legend: :mod:`pbs.ops.grid`; s stride, a group is s consecutive tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from pbs.ops.backends import backend_module
from pbs.ops.grid import BlockGrid


def antidiagonal_block_sums(
    q: Tensor,
    k: Tensor,
    *,
    stride: int,
    scale: float,
    grid: BlockGrid,
    limits: Tensor | None = None,
    beside: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sum of the group probabilities in each block.

    The score of query group g and key group f is the mean over the antidiagonal of their s x s
    square, ``sum_t q[g s + s - 1 - t] k[f s + t] scale / s``; a partial group is filled with zeros.
    The softmax over f is in fp32. The logits are never in memory at once.

    Args:
        q: ``[Z, Hq, Nq, D]``.
        k: ``[Z, Ho, Nk, D]``, Hq a multiple of Ho.
        stride: s, divides both tiles.
        scale: factor of the logits, positive.
        grid: the blocks.
        limits: how many leading key blocks take part in the softmax of each query block, int
            ``[Tq]``; None: every key group that starts at or before the query group's last token.
        beside: what else takes part in the softmax of each query group, as the log of its sum of
            exponentials, fp32 ``[Z, Hq, Tq query_tile / s]``; None: nothing. See
            :func:`pbs.ops.antidiagonal.own_logsumexp`.
        backend: "auto" (Triton on a CUDA device, else the reference), "reference" or "triton".

    Returns:
        fp32 ``[Z, Hq, Tq, Tk]``; a row sums to its number of real query groups, less the share of
        what is beside, or to 0 where no block takes part.

    Raises:
        ValueError: the stride does not divide the tiles.

    Source: arXiv 2503.16428, Algorithm 1.
    """
    if grid.query_tile % stride or grid.key_tile % stride:
        raise ValueError(
            f"stride must divide the block size, got stride {stride} and block size "
            f"{grid.query_tile}; try 8 or 16"
        )
    module = backend_module("antidiagonal", backend, q)
    ends = _ends(grid, stride, limits, q.device)
    sums: Tensor = module.antidiagonal_block_sums(
        q, k, stride=stride, scale=scale, grid=grid, ends=ends, beside=beside
    )
    return sums


def query_groups(grid: BlockGrid, stride: int, device: torch.device) -> Tensor:
    """Query groups with a real token in each query tile, int64 ``[Tq, 1]``."""
    starts = torch.arange(grid.num_query_tiles, device=device) * grid.query_tile
    tokens = (grid.num_queries - starts).clamp(max=grid.query_tile)
    return ((tokens + stride - 1) // stride)[:, None]


def _ends(grid: BlockGrid, stride: int, limits: Tensor | None, device: torch.device) -> Tensor:
    """How many leading key groups each query group attends to, int32 ``[Tq query_tile / s]``."""
    per_tile = grid.query_tile // stride
    groups = torch.arange(grid.num_query_tiles * per_tile, device=device)
    if limits is None:
        last = ((groups + 1) * stride - 1 + grid.offset).clamp(max=grid.num_keys - 1)
        ends = last // stride + 1
    else:
        ends = limits.to(device).repeat_interleave(per_tile) * (grid.key_tile // stride)
    return ends.masked_fill(groups * stride >= grid.num_queries, 0).int()

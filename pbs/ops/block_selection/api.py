"""Selection by cumulative probability, fused with making the lists. Legend: :mod:`pbs.ops.grid`."""

from __future__ import annotations

from torch import Tensor

from pbs.ops.backends import backend_module
from pbs.ops.block_selection.reference import select_top_p
from pbs.ops.grid import BlockGrid

__all__ = ["list_blocks", "select_pooled_blocks", "select_top_p", "select_top_p_blocks"]


def list_blocks(mask: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Lists of the True places of each row.

    Args:
        mask: bool ``[Z, H, Tq, Tk]``.
        backend: see :func:`select_top_p_blocks`.

    Returns:
        Ascending indices, int32 (Triton: int16, half the memory; multiply only after a cast)
        ``[Z, H, Tq, F]``, and how many are valid, int32 ``[Z, H, Tq]``. Entries past a row's count
        are undefined.
    """
    listed: tuple[Tensor, Tensor] = backend_module("block_selection", backend, mask).list_blocks(
        mask
    )
    return listed


def select_top_p_blocks(
    probabilities: Tensor,
    *,
    threshold: float,
    candidates: Tensor,
    limits: Tensor,
    forced: Tensor | None = None,
    covered: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Keep, per query block, the fewest key blocks whose probability reaches the threshold.

    Args:
        probabilities: fp32 ``[Z, Hq, Tq, Tk]``; rows sum to at most 1 over their candidates.
        threshold: cumulative probability to reach (τ), in (0, 1]; 1 keeps every candidate.
        candidates: how many leading key blocks take part in each row, int ``[Tq]``.
        limits: how many leading key blocks may be listed in each row, int ``[Tq]``, at most
            ``candidates``; the rest (the diagonal) is computed anyway.
        forced: a key block to list whatever its probability, int ``[1 or Z, Ho]``, Hq a multiple of
            Ho.
        covered: what of each row is computed whatever is selected, beside its key blocks, in the
            units of the probabilities, fp32 ``[Z, Hq, Tq]`` in [0, 1]. The threshold is then one of
            the whole row: what is covered counts towards it, and so do the blocks computed anyway,
            the forced one and the candidates past the limits. With exact probabilities τ is a lower
            bound of the coverage. None: the threshold is one of the candidates alone, and a forced
            block comes on top.
        backend: "auto" (Triton on a CUDA device, else the reference), "reference" or "triton".

    Returns:
        As :func:`list_blocks`. Ties go to the lower index.

    Raises:
        ValueError: probabilities or ``covered`` of another shape, or an unknown backend.

    Source: arXiv 2510.21270, section 3.3. A block is kept iff the sum of the more probable ones
    (and of what is covered) is below τ, so a row whose rounded sum never reaches τ keeps all its
    blocks; the reference code of the paper drops them.
    """
    if probabilities.ndim != 4:
        raise ValueError(
            f"expected probabilities [Z, Hq, Tq, Tk], got {tuple(probabilities.shape)}"
        )
    if covered is not None and covered.shape != probabilities.shape[:3]:
        raise ValueError(
            f"expected covered {list(probabilities.shape[:3])}, got {tuple(covered.shape)}; give a "
            "share per sequence, query head and query block"
        )
    selected: tuple[Tensor, Tensor] = backend_module(
        "block_selection", backend, probabilities
    ).select_top_p_blocks(
        probabilities,
        threshold=threshold,
        candidates=candidates,
        limits=limits,
        forced=forced,
        covered=covered,
    )
    return selected


def select_pooled_blocks(
    q_means: Tensor,
    k_means: Tensor,
    *,
    scale: float,
    threshold: float,
    candidates: Tensor,
    limits: Tensor,
    forced: Tensor | None = None,
    grid: BlockGrid | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """:func:`select_top_p_blocks` of softmax(q̄ k̄ᵀ scale) over the candidates.

    The Triton backend holds at most ``MAX_SCORES`` logits at a time and never writes probabilities.

    Args:
        q_means: a vector per query block, fp32 ``[Z, Hq, Tq, D]``.
        k_means: a vector per key block, fp32 ``[Z, Ho, Tk, D]``, Hq a multiple of Ho.
        scale: factor of the logits.
        threshold: as there, like all that follow.
        candidates: as there.
        limits: as there.
        forced: as there.
        grid: the tiles that the blocks are; given, no candidate may lie past its causal ones, and
            the Triton backend computes no logits there.
        backend: as there.

    Returns:
        As :func:`list_blocks`.

    Source: arXiv 2510.21270, section 3.3 and Algorithm 2.
    """
    selected: tuple[Tensor, Tensor] = backend_module(
        "block_selection", backend, q_means
    ).select_pooled_blocks(
        q_means,
        k_means,
        scale=scale,
        threshold=threshold,
        candidates=candidates,
        limits=limits,
        forced=forced,
        grid=grid,
    )
    return selected

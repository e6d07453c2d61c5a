"""The public functions: Triton on a CUDA device, else eager PyTorch. Legend: :mod:`pbs.ops.grid`.

P proxy queries.
"""

from __future__ import annotations

from torch import Tensor

from pbs.ops.backends import backend_module


def key_importance(proxy: Tensor, k: Tensor, *, scale: float, backend: str = "auto") -> Tensor:
    """Mean attention probability of each key over the proxy queries, without a causal mask.

    Args:
        proxy: ``[Z, Ho, P, D]``, in k's dtype, or fp32 (means of queries, not rounded).
        k: ``[Z, Hkv, N, D]``, Ho a multiple of Hkv.
        scale: factor of the logits.
        backend: "auto", "reference" or "triton".

    Returns:
        fp32 ``[Z, Ho, N]``; never more than a bounded chunk of the P x N scores is in memory.

    Source: arXiv 2510.21270, section 3.2.
    """
    importance: Tensor = backend_module("permutation", backend, k).key_importance(
        proxy, k, scale=scale
    )
    return importance


def sort_segments(
    scores: Tensor, *, num_keys: int, segment_size: int, backend: str = "auto"
) -> Tensor:
    """Positions of the keys by descending score inside each segment, ties in natural order.

    Args:
        scores: not negative, fp32 ``[Z, Ho, n S]``, one per key of the complete segments.
        num_keys: Nk; keys from n S on keep their place.
        segment_size: S.
        backend: "auto", "reference" or "triton".

    Returns:
        int64 ``[Z, Ho, Nk]``.
    """
    order: Tensor = backend_module("permutation", backend, scores).sort_segments(
        scores, num_keys=num_keys, segment_size=segment_size
    )
    return order


def importance_order(
    proxy: Tensor, k: Tensor, *, scale: float, segment_size: int, backend: str = "auto"
) -> Tensor:
    """:func:`sort_segments` of the :func:`key_importance` of the complete segments, in one step.

    Args:
        proxy: ``[Z, Ho, P, D]``, as there.
        k: ``[Z, Hkv, Nk, D]``, Ho a multiple of Hkv, with at least one complete segment.
        scale: factor of the logits.
        segment_size: S; keys of an incomplete last segment keep their place.
        backend: "auto", "reference" or "triton".

    Returns:
        Original position of the key at each place, int64 ``[Z, Ho, Nk]``.

    Raises:
        ValueError: no segment is complete.

    Source: arXiv 2510.21270, section 3.2 and Algorithm 1.
    """
    if k.shape[2] < segment_size:
        raise ValueError(
            f"expected at least one complete segment of {segment_size} keys, got {k.shape[2]} keys"
        )
    order: Tensor = backend_module("permutation", backend, k).importance_order(
        proxy, k, scale=scale, segment_size=segment_size
    )
    return order


def gather_and_pool(
    x: Tensor, order: Tensor, *, tile: int, pad_mean: str = "real", backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """:func:`gather_keys`, and :func:`pbs.ops.pooling.mean_pool` of the result, in one pass.

    Args:
        x: as there.
        order: as there.
        tile: tokens per mean, a power of two of at least 16.
        pad_mean: as there.
        backend: "auto", "reference" or "triton".

    Returns:
        ``[Z, Ho, Nk, D]`` and fp32 ``[Z, Ho, T, D]``.
    """
    found: tuple[Tensor, Tensor] = backend_module("permutation", backend, x).gather_and_pool(
        x, order, tile=tile, pad_mean=pad_mean
    )
    return found


def gather_keys(x: Tensor, order: Tensor, *, backend: str = "auto") -> Tensor:
    """Keys or values in the order of each head.

    Args:
        x: ``[Z, Hkv, Nk, D]``.
        order: original position of the key at each place, int64 ``[Z, Ho, Nk]``, Ho a multiple of
            Hkv.
        backend: "auto", "reference" or "triton".

    Returns:
        ``[Z, Ho, Nk, D]``, contiguous.
    """
    gathered: Tensor = backend_module("permutation", backend, x).gather_keys(x, order)
    return gathered

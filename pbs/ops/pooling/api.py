"""Triton on a CUDA device, else eager PyTorch. Legend: see :mod:`pbs.ops.grid`."""

from __future__ import annotations

from torch import Tensor

from pbs.ops.backends import backend_module
from pbs.ops.pooling.reference import block_logits, softmax_over

__all__ = ["block_logits", "mean_pool", "softmax_over"]


def mean_pool(x: Tensor, tile: int, *, pad_mean: str = "real", backend: str = "auto") -> Tensor:
    """Mean of each tile of tokens.

    Args:
        x: ``[Z, H, N, D]``.
        tile: tokens per tile, a power of two of at least 16 for the Triton backend.
        pad_mean: "real" divides a partial last tile by its tokens, "reference" by the tile, as the
            original code does by padding with zeros.
        backend: "auto", "reference" or "triton".

    Returns:
        fp32 ``[Z, H, T, D]``.
    """
    module = backend_module("pooling", backend, x)
    means: Tensor = module.mean_pool(x, tile, pad_mean=pad_mean)
    return means

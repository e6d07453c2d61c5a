"""Triton on a CUDA device, else eager PyTorch. Legend: see :mod:`pbs.ops.grid`; R rows."""

from __future__ import annotations

from torch import Tensor

from pbs.ops.backends import backend_module


def tile_logsumexp(
    rows: Tensor,
    keys: Tensor,
    begins: Tensor,
    ends: Tensor,
    *,
    tile: int,
    scale: float,
    backend: str = "auto",
) -> Tensor:
    """log of the sum of exp(logit) over each tile of keys, for any set of query rows.

    A softmax over the tiles of a row gives the attention that each tile holds. Costs the logits of
    R rows and nothing of their size in memory.

    Args:
        rows: ``[Z, Hq, R, D]``.
        keys: ``[Z, Ho, Nk, D]`` in rows' dtype, Hq a multiple of Ho.
        begins: the first key that a row sees, a multiple of ``tile``, int ``[Hq, R]``.
        ends: one past its last key, int ``[Hq, R]``, at most Nk; at most ``begins``: it sees none.
        tile: keys per tile; a power of two for the Triton backend.
        scale: factor of the logits, positive.
        backend: "auto", "reference" or "triton".

    Returns:
        fp32 ``[Z, Hq, R, Tk]``; -inf where a row sees no key of a tile.

    Raises:
        ValueError: bounds of another shape.
    """
    expected = (rows.shape[1], rows.shape[2])
    for name, bounds in (("begins", begins), ("ends", ends)):
        if tuple(bounds.shape) != expected:
            raise ValueError(f"expected {name} {list(expected)}, got {list(bounds.shape)}")
    module = backend_module("tile_logsumexp", backend, rows)
    sums: Tensor = module.tile_logsumexp(rows, keys, begins, ends, tile=tile, scale=scale)
    return sums

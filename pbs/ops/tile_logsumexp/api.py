"""Triton on a CUDA device, else eager PyTorch. Legend: see :mod:`pbs.ops.grid`; R rows."""

from __future__ import annotations

from torch import Tensor

from pbs.ops.backends import backend_module


def tile_logsumexp(
    rows: Tensor,
    keys: Tensor,
    ends: Tensor,
    *,
    tile: int,
    scale: float,
    natural: Tensor | None = None,
    until: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """log of the sum of exp(logit) over each tile of keys, for any set of query rows.

    A softmax over the tiles of a row gives the attention that each tile holds. Costs the logits of
    R rows and nothing of their size in memory.

    Args:
        rows: ``[Z, Hq, R, D]``.
        keys: ``[Z, Ho, Nk, D]`` in rows' dtype, Hq a multiple of Ho.
        ends: one past the last key that a row sees, int ``[Hq, R]``, at most Nk.
        tile: keys per tile; a power of two for the Triton backend.
        scale: factor of the logits, positive.
        natural: keys in another order, ``[Z, Hkv, Nk, D]``, of which a row sees those from its end
            on; ends are then multiples of ``tile``.
        until: one past the last of those, int ``[Hq, R]``, at most Nk; at or before the row's end:
            it sees none.
        backend: "auto", "reference" or "triton".

    Returns:
        fp32 ``[Z, Hq, R, Tk]``; -inf where a row sees no key of a tile.

    Raises:
        ValueError: bounds of another shape, or one of ``natural`` and ``until`` without the other.
    """
    expected = (rows.shape[1], rows.shape[2])
    if (natural is None) != (until is None):
        raise ValueError("natural and until belong together: give both, or neither")
    for name, bounds in (("ends", ends), ("until", until)):
        if bounds is not None and tuple(bounds.shape) != expected:
            raise ValueError(f"expected {name} {list(expected)}, got {list(bounds.shape)}")
    module = backend_module("tile_logsumexp", backend, rows)
    sums: Tensor = module.tile_logsumexp(
        rows, keys, ends, natural=natural, until=until, tile=tile, scale=scale
    )
    return sums

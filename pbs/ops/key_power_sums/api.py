"""Triton on a CUDA device, else eager PyTorch. Legend: see :mod:`pbs.ops.grid`; R rows."""

from __future__ import annotations

from torch import Tensor

from pbs.ops.backends import backend_module


def key_power_sums(
    rows: Tensor,
    keys: Tensor,
    ends: Tensor,
    *,
    scale: float,
    power: float,
    backend: str = "auto",
) -> Tensor:
    """log of the sum over rows of each key's attention, to a power.

    The attention of a row is its softmax over the keys that it sees. Logarithms, since powers of
    small probabilities would vanish.

    Args:
        rows: ``[Z, Hq, R, D]``.
        keys: ``[Z, Ho, Nk, D]`` in rows' dtype, Hq a multiple of Ho.
        ends: how many keys each row sees, ascending, int ``[R]``, at most Nk.
        scale: factor of the logits, positive.
        power: at least 1.
        backend: "auto", "reference" or "triton".

    Returns:
        fp32 ``[Z, Hq, Nk]``; -inf for keys that no row sees.

    Raises:
        ValueError: ends of another shape.
    """
    if ends.shape != (rows.shape[2],):
        raise ValueError(f"expected ends [{rows.shape[2]}], got {list(ends.shape)}")
    module = backend_module("key_power_sums", backend, rows)
    sums: Tensor = module.key_power_sums(rows, keys, ends, scale=scale, power=power)
    return sums

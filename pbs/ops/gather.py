"""Keys and values in plan order. Legend: see :mod:`pbs.ops.grid`."""

from __future__ import annotations

from torch import Tensor


def gather_keys(x: Tensor, order: Tensor) -> Tensor:
    """Keys or values in the order of each head.

    Args:
        x: ``[Z, Hkv, Nk, D]``.
        order: original position of the key at each place, int64 ``[Z, Ho, Nk]``, Ho a multiple of
            Hkv.

    Returns:
        ``[Z, Ho, Nk, D]``, contiguous.
    """
    groups = order.shape[1] // x.shape[1]
    # expand() makes no copy: gather reads each repeated head from the same memory.
    repeated = x.unsqueeze(2).expand(-1, -1, groups, -1, -1)
    index = order.unflatten(1, (x.shape[1], groups)).unsqueeze(-1).expand_as(repeated)
    return repeated.gather(3, index).flatten(1, 2)

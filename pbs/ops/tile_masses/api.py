"""Triton on a CUDA device, else eager PyTorch.

Legend: see :mod:`pbs.ops.grid`; r rows of a query tile.
"""

from __future__ import annotations

from torch import Tensor

from pbs.ops.backends import backend_module


def tile_masses(
    sums: Tensor,
    counts: Tensor,
    limits: Tensor,
    *,
    power: float,
    smooth: Tensor | None = None,
    smooth_counts: Tensor | None = None,
    share: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """What each candidate key tile holds of a query tile's attention, by some rows of the tile.

    Each row's log-sums become probabilities over all that it sees; candidates among them are joined
    over the rows by a power mean, scaled to the total that the plain mean has. Second log-sums, of
    pooled queries and keys say, become probabilities over the candidates alone, averaged over their
    rows, and take a share of that total.

    Args:
        sums: log of a sum of exp(logit) over each key tile, fp32 ``[Z, Hq, Tq, r, Tk]``, -inf where
            a row sees nothing of a tile; every row that counts sees something.
        counts: how many leading rows of a query tile count, int ``[Tq]``, at least 1.
        limits: how many leading key tiles are candidates, int ``[Tq]``.
        power: exponent of the mean over rows, at least 1; 1 is the mean.
        smooth: second log-sums, fp32 ``[Z, Hq, Tq, e, Tk]``, -inf past the candidates.
        smooth_counts: how many leading rows of those count, int ``[Tq]``.
        share: of the second, in [0, 1].
        backend: "auto", "reference" or "triton".

    Returns:
        fp32 ``[Z, Hq, Tq, Tk]``, 0 at key tiles that are no candidates.

    Raises:
        ValueError: one of ``smooth`` and ``smooth_counts`` without the other.
    """
    if (smooth is None) != (smooth_counts is None):
        raise ValueError("smooth and smooth_counts belong together: give both, or neither")
    masses: Tensor = backend_module("tile_masses", backend, sums).tile_masses(
        sums,
        counts,
        limits,
        power=power,
        smooth=smooth,
        smooth_counts=smooth_counts,
        share=share,
    )
    return masses

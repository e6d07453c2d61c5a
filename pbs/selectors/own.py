"""The keys that a query computes whatever is selected. Legend: see :mod:`pbs.ops.grid`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pbs.ops.grid import BlockGrid
from pbs.ops.plan import own_windows

NORMALISERS = ("candidates", "causal")


@dataclass(frozen=True)
class OwnKeys:
    """A query's own keys: from the end of its tile's candidates up to its position.

    Together with the candidates they are all that it sees. They are attended to in natural order,
    whatever the order of the candidates.

    Attributes:
        keys: ``[Z, Hkv, Nk, D]`` in natural order.
        width: no tile's own keys reach further than this many after its candidates; a multiple of
            the key tile.
        query_order: original row of the query at each place, int64 ``[Z, Hq, Nq]``; None if no
            query moved.
        num_moved: how many leading candidates of each row are blocks of keys in plan order, int
            ``[Tq]``; those after them are blocks of ``keys``. None: all are in plan order.
    """

    keys: Tensor
    width: int
    query_order: Tensor | None = None
    num_moved: Tensor | None = None

    @classmethod
    def of(
        cls,
        k: Tensor,
        grid: BlockGrid,
        *,
        segment_size: int,
        query_segment: int = 0,
        query_order: Tensor | None = None,
    ) -> OwnKeys:
        """Those beside the candidates of :func:`pbs.ops.grid.candidate_tiles`.

        Args:
            k: ``[Z, Hkv, Nk, D]`` in natural order.
            grid: the blocks.
            segment_size: as there.
            query_segment: as there.
            query_order: see the class.
        """
        windows, _ = own_windows(
            grid, k.device, segment_size=segment_size, query_segment=query_segment
        )
        return cls(k, windows.shape[-1] * grid.key_tile, query_order)

    @classmethod
    def after(cls, candidates: Tensor, k: Tensor, grid: BlockGrid) -> OwnKeys:
        """All keys after the candidates, where nothing has moved; waits for the device.

        Args:
            candidates: bool ``[Tq, Tk]``, their Trues leading each row.
            k: ``[Z, Hkv, Nk, D]``.
            grid: the blocks.
        """
        ends = grid.last_positions(k.device) // grid.key_tile + 1
        return cls(k, int((ends - candidates.sum(dim=-1)).max()) * grid.key_tile)

    def positions(self, grid: BlockGrid) -> Tensor:
        """Position of each query in plan order, int64 ``[1 or Z, 1 or Hq, Nq]``."""
        if self.query_order is not None:
            return self.query_order + grid.offset
        return torch.arange(grid.offset, grid.num_keys, device=self.keys.device)[None, None]

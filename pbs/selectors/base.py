"""What a selector is. Legend: see :mod:`pbs.ops.grid`."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from pbs.ops.block_selection import select_top_p_blocks
from pbs.ops.grid import BlockGrid
from pbs.ops.permutation import gather_keys
from pbs.selectors.own import OwnKeys


class Selector(ABC):
    """Estimates the attention probability of key blocks. Never reads v, never sees the output."""

    @abstractmethod
    def block_probabilities(
        self, q: Tensor, k: Tensor, *, scale: float, grid: BlockGrid, candidates: Tensor
    ) -> Tensor:
        """Probability of each candidate key block, per query block.

        Args:
            q: ``[Z, Hq, Nq, D]`` in natural order.
            k: ``[Z, Ho, Nk, D]`` in plan order; Hq is a multiple of Ho.
            scale: factor of the logits.
            grid: the blocks.
            candidates: blocks that may be selected, bool ``[Tq, Tk]``.

        Returns:
            fp32 ``[Z, Hq, Tq, Tk]``; rows sum to 1 over the candidates, a row without candidates
            is 0. A threshold of them is relative to the candidates: no coverage.
        """

    def block_scores(
        self,
        q: Tensor,
        k: Tensor,
        *,
        scale: float,
        grid: BlockGrid,
        candidates: Tensor,
        own: OwnKeys | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Block probabilities, and what a query's own keys hold beside them.

        Args:
            q: as for :meth:`block_probabilities`, like all up to ``candidates``.
            k: as there.
            scale: as there.
            grid: as there.
            candidates: as there.
            own: the keys that each query computes whatever is selected; None: all later than the
                candidates, where neither q nor k has moved.

        Returns:
            fp32 ``[Z, Hq, Tq, Tk]``, and fp32 ``[Z, Hq, Tq]`` with which each row sums to 1 (see
            ``covered`` of :func:`pbs.ops.block_selection.select_top_p_blocks`). None, unless a
            selector overrides this: own keys take no part, rows are probabilities as above.
        """
        del own  # for selectors that credit them
        probabilities = self.block_probabilities(
            q, k, scale=scale, grid=grid, candidates=candidates
        )
        return probabilities, None

    def arranged_scores(
        self,
        q: Tensor,
        k: Tensor,
        *,
        scale: float,
        grid: BlockGrid,
        candidates: Tensor,
        own: OwnKeys | None,
    ) -> tuple[Tensor, Tensor | None]:
        """:meth:`block_scores` where some candidates are of keys in natural order.

        Scored once in each order: natural order says how much the two kinds hold, the order of the
        plan how the blocks of moved keys share theirs.

        Args:
            q: as for :meth:`block_scores`, like all up to ``candidates``.
            k: as there.
            scale: as there.
            grid: as there.
            candidates: as there.
            own: as there; its ``num_moved`` says where natural order begins.

        Returns:
            As there.
        """
        if own is None or own.num_moved is None:
            return self.block_scores(q, k, scale=scale, grid=grid, candidates=candidates, own=own)
        tiles = torch.arange(grid.num_key_tiles, device=q.device)
        is_moved = candidates & (tiles < own.num_moved[:, None])
        natural, covered = self.block_scores(
            q, own.keys, scale=scale, grid=grid, candidates=candidates, own=None
        )
        later = OwnKeys.after(is_moved, own.keys, grid)
        moved, _ = self.block_scores(q, k, scale=scale, grid=grid, candidates=is_moved, own=later)
        held = natural.masked_fill(~is_moved, 0.0).sum(dim=-1, keepdim=True)
        moved = moved * (held / moved.sum(dim=-1, keepdim=True).clamp(min=1e-30))
        return torch.where(is_moved, moved, natural), covered

    def gather(self, k: Tensor, order: Tensor, *, tile: int) -> tuple[Tensor, Tensor | None]:
        """The keys in an order, and the means of their blocks if the selector goes by them.

        Args:
            k: ``[Z, Hkv, Nk, D]`` in natural order.
            order: original position of the key at each place, ``[Z, Ho, Nk]``.
            tile: keys per block (B).

        Returns:
            ``[Z, Ho, Nk, D]`` in k's dtype, and fp32 ``[Z, Ho, Tk, D]`` or None, as
            :meth:`select` takes them.
        """
        del tile  # for selectors that pool
        return gather_keys(k, order), None

    def select(
        self,
        q: Tensor,
        k: Tensor,
        *,
        scale: float,
        grid: BlockGrid,
        candidates: Tensor,
        num_candidates: Tensor,
        limits: Tensor,
        threshold: float,
        forced: Tensor | None,
        own: OwnKeys | None = None,
        k_means: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The fewest blocks whose probability reaches the threshold.

        Args:
            q: as for :meth:`block_probabilities`, like all up to ``candidates``, whose Trues must
                lead each row.
            k: as there.
            scale: as there.
            grid: as there.
            candidates: as there.
            num_candidates: how many there are in each row, int ``[Tq]``.
            limits: how many leading blocks may be listed in each row, int ``[Tq]``.
            threshold: cumulative probability to reach (τ), in (0, 1].
            forced: a block to list whatever its probability, int ``[1 or Z, Ho]``; None: no block.
            own: as for :meth:`block_scores`.
            k_means: mean of each key block, fp32 ``[Z, Ho, Tk, D]``, if it is known already.

        Returns:
            As :func:`pbs.ops.block_selection.select_top_p_blocks`.
        """
        del k_means  # for selectors that pool by the mean
        probabilities, covered = self.arranged_scores(
            q, k, scale=scale, grid=grid, candidates=candidates, own=own
        )
        return select_top_p_blocks(
            probabilities,
            threshold=threshold,
            candidates=num_candidates,
            limits=limits,
            forced=forced,
            covered=covered,
        )

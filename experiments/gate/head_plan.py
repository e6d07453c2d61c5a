"""What a plan computes for one head of one sequence, key by key. Legend: see :mod:`pbs.ops.grid`.

R rows, L keys that the rows at hand can see.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pbs.ops.plan import AttentionPlan


@dataclass(frozen=True)
class HeadPlan:
    """The lists of one head of one sequence, counts as Python numbers (one copy per head).

    Make it with :meth:`of`; the attributes are those of :class:`pbs.AttentionPlan` without the
    leading sequence and head.
    """

    plan: AttentionPlan
    blocks: Tensor  # [Tq, F]
    num_blocks: list[int]
    windows: Tensor  # [Tq, W]
    num_windows: list[int]
    columns: Tensor | None  # [Tq, C]
    num_columns: list[int]
    order: Tensor | None  # [Nk]
    query_order: Tensor | None  # [Nq]
    local_window: tuple[int, int] | None

    @classmethod
    def of(cls, plan: AttentionPlan, sequence: int, head: int) -> HeadPlan:
        """The lists of a head in [0, Hq) of a sequence in [0, Z)."""

        def pick(tensor: Tensor | None) -> Tensor | None:
            """This sequence and head, where one entry may stand for all or for a group."""
            if tensor is None:
                return None
            own = tensor[sequence if tensor.shape[0] > 1 else 0]
            return own[head // (plan.num_heads // own.shape[0])].long()

        columns, num_columns = pick(plan.columns), pick(plan.num_columns)
        local = None
        if plan.local_window is not None:
            num_init, num_local = plan.local_window[head].tolist()
            local = (num_init, num_local)
        return cls(
            plan,
            pick(plan.blocks),
            pick(plan.num_blocks).tolist(),
            pick(plan.windows),
            pick(plan.num_windows).tolist(),
            columns,
            [] if num_columns is None else num_columns.tolist(),
            pick(plan.order),
            pick(plan.query_order),
            local,
        )

    def whole_keys(self, tile: int) -> Tensor:
        """Keys that every query of the tile sees, original positions, int64."""
        width = self.plan.grid.key_tile
        starts = self.blocks[tile, : self.num_blocks[tile]] * width
        places = (starts[:, None] + torch.arange(width, device=starts.device)).flatten()
        keys = places if self.order is None else self.order[places]
        if self.columns is not None:
            keys = torch.cat([keys, self.columns[tile, : self.num_columns[tile]]])
        return keys

    def window_keys(self, tile: int, num_keys: int) -> Tensor:
        """Keys below ``num_keys`` in the tile's windows; which rows see them is up to each row."""
        width = self.plan.grid.key_tile
        starts = self.windows[tile, : self.num_windows[tile]]
        keys = (starts[:, None] + torch.arange(width, device=starts.device)).flatten()
        return keys[keys < num_keys]

    def sees(self, positions: Tensor, keys: Tensor) -> Tensor:
        """Causality and the token rule inside windows, bool ``[R, keys]``."""
        seen = keys <= positions[:, None]
        if self.local_window is not None:
            num_init, num_local = self.local_window
            seen &= (keys < num_init) | (positions[:, None] - keys < num_local)
        return seen

    def key_counts(self, tile: int) -> Tensor:
        """How often the tile names each key, int64 ``[Nk]``; in a sound plan 0 or 1.

        Keys in windows count as if every query saw them: a causal mask must follow. Without the
        windows if :attr:`local_window` says which of their keys each query sees.
        """
        num_keys = self.plan.grid.num_keys
        keys = self.whole_keys(tile)
        if self.local_window is None:
            keys = torch.cat([keys, self.window_keys(tile, num_keys)])
        return torch.bincount(keys, minlength=num_keys)

    def tiles_of(self, rows: Tensor) -> Tensor:
        """The query tile that computes each row, int64 ``[R]``."""
        places = rows
        if self.query_order is not None:
            inverse = torch.empty_like(self.query_order)
            inverse[self.query_order] = torch.arange(len(inverse), device=inverse.device)
            places = inverse[rows]
        return places // self.plan.grid.query_tile

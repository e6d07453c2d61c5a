"""StreamingLLM (A-shape): the first tokens and a sliding window. Legend: see pbs.ops.grid."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pbs.checks import check_block_size, check_integer
from pbs.methods.base import AttentionMethod, Call, Knob
from pbs.methods.facts import Facts
from pbs.ops.block_selection import list_blocks
from pbs.ops.grid import BlockGrid
from pbs.ops.plan import AttentionPlan


@dataclass(kw_only=True)
class StreamingLLM(AttentionMethod):
    """Query n sees key j <= n iff j < n_init or n - j < n_local, token by token.

    Nothing is selected: every head and every input of one length computes the same pairs. Prompts
    of at most n_init + n_local keys run dense.

    Args:
        block_size: tokens per tile side (B), a power of two of at least 16. It changes speed and
            density, not the result (except through ``num_last_full``).
        n_init: first tokens that every query sees (attention sinks), at least 0.
        n_local: last tokens that a query sees, itself included, at least 1.
        num_last_full: tri-shape: at least this many of the last queries see everything before
            them. Whole tiles of queries do, so that up to B - 1 more queries may; n_local must then
            be at least 2 B.

    Source: arXiv 2309.17453. The default sizes are those of the baseline "StreamingLLM" in the
    MInference paper (arXiv 2407.02490), 1024 + 4096; tri-shape is from arXiv 2412.10319.
    """

    facts = Facts(
        "StreamingLLM",
        "#56B4E9",
        "X",
        selection="none",
        curve=(
            {"n_init": 128, "n_local": 512},
            {"n_init": 256, "n_local": 1024},
            {"n_init": 512, "n_local": 2048},
        ),
    )

    # n_init stays a quarter of n_local, as in the defaults. No prompt is longer than 2^20 tokens.
    knob = Knob("n_local", low=1, high=1 << 20, is_integer=True, proportional=("n_init",))

    block_size: int = 128
    n_init: int = 1024
    n_local: int = 4096
    num_last_full: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block_size(self.block_size)
        for name, smallest in (("n_init", 0), ("n_local", 1), ("num_last_full", 0)):
            check_integer(getattr(self, name), name=name, smallest=smallest)
        if self.num_last_full and self.n_local < 2 * self.block_size:
            raise ValueError(
                "num_last_full needs n_local of at least 2 * block_size (a tile's own keys are "
                f"computed in its window), got n_local={self.n_local} and "
                f"block_size={self.block_size}; use a smaller block_size or a larger n_local"
            )

    def densest(self) -> AttentionMethod:
        """See the base class."""
        return replace(self, n_local=1 << 30)

    def select(self, call: Call) -> AttentionPlan:
        """See the base class."""
        device, (batch, num_heads) = call.q.device, call.q.shape[:2]
        grid = call.grid(self.block_size)
        reason = ""
        if grid.num_keys <= self.n_init + self.n_local:
            reason = f"no more keys than n_init + n_local={self.n_init + self.n_local}"
        elif grid.num_queries <= self.num_last_full:
            reason = f"no more queries than num_last_full={self.num_last_full}"
        if reason:
            return call.dense(reason, tile=self.block_size)
        sizes = torch.tensor([[self.n_init, self.n_local]], device=device)
        whole, partial = a_shape_tiles(grid, sizes, num_last_full=self.num_last_full)
        blocks, num_blocks = list_blocks(whole[None])
        tiles, num_windows = list_blocks(partial[None])
        return AttentionPlan(
            grid,
            batch,
            num_heads,
            blocks,
            num_blocks,
            tiles.int() * grid.key_tile,
            num_windows,
            local_window=sizes.int().repeat(num_heads, 1),
        )


def a_shape_tiles(
    grid: BlockGrid, sizes: Tensor, *, num_last_full: int = 0
) -> tuple[Tensor, Tensor]:
    """Tiles that A-shape heads compute.

    Args:
        grid: the tiles.
        sizes: (n_init, n_local) of each head, int ``[H, 2]``.
        num_last_full: query tiles that hold one of this many last queries compute everything.

    Returns:
        Tiles that every query of the tile sees whole, and those of which some pairs are seen, both
        bool ``[H, Tq, Tk]``. The second need the token rule (``AttentionPlan.local_window``).
    """
    device = sizes.device
    first = grid.first_positions(device)[:, None]
    last = grid.last_positions(device)[:, None]
    starts = torch.arange(grid.num_key_tiles, device=device) * grid.key_tile
    ends = starts + grid.key_tile
    past, causal = grid.past_tiles(device), starts <= last
    n_init, n_local = sizes[:, :, None, None].unbind(1)
    # The farthest key that is not among the first ones decides; there may be none.
    farthest = torch.maximum(starts, n_init)
    whole = past & ((ends <= n_init) | (last - farthest < n_local))
    touched = causal & ((starts < n_init) | (first - (ends - 1) < n_local))
    is_full = last >= grid.num_keys - num_last_full
    whole = whole | (past & is_full)
    touched = touched | (causal & is_full)
    return whole, touched & ~whole

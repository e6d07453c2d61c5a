"""Blocks drawn at random: what a density is worth without a selection. Legend: see pbs.ops.grid."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from pbs.checks import check_block_size, check_threshold
from pbs.methods.base import AttentionMethod, Call, Knob
from pbs.methods.facts import Facts, at
from pbs.ops.block_selection import list_blocks
from pbs.ops.grid import BlockGrid
from pbs.ops.plan import AttentionPlan, own_windows
from pbs.ops.stages import stage
from pbs.orders.base import check_seed
from pbs.orders.random import scramble


@dataclass(kw_only=True)
class RandomBlocks(AttentionMethod):
    """A control: as many blocks as asked for, drawn uniformly, whatever queries and keys hold.

    Every query tile computes its own blocks on the diagonal and the first one; the others are drawn
    without replacement among those before it. Tiles of queries get blocks in proportion to how many
    they see, so that the density holds from the first tile to any tile, to one tile. Where the
    forced blocks are more than that, at the start, later tiles draw fewer until it is made up.

    The draw is a hash of (seed, layer, head, position of the query tile, key block): the same on
    every device, for every sequence of a batch, for a whole prompt and for its parts that begin at
    a multiple of the block size. Heads and layers draw apart.

    Args:
        block_size: tokens per tile side (B), a power of two of at least 16.
        density: computed tiles / tiles of dense causal attention, in (0, 1]; 1 equals dense. Below
            what the forced blocks make up, these alone are computed.
        force_select_first_block: always compute block 0, the attention sink.
        seed: of the draws, at least 0; those that are equal modulo 2^32 draw alike.

    Source: no paper; a selector is worth what it gains over this at equal density.
    """

    knob = Knob("density", low=0.001, high=1.0)
    facts = Facts(
        "random blocks", "#DDCC77", "d", selection="none", curve=at("density", 0.2, 0.35, 0.5)
    )

    block_size: int = 128
    density: float = 0.5
    force_select_first_block: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block_size(self.block_size)
        check_threshold(self.density, name="density")
        check_seed(self.seed)

    def densest(self) -> AttentionMethod:
        """See the base class."""
        return replace(self, density=1.0)

    def select(self, call: Call) -> AttentionPlan:
        """See the base class."""
        device, (batch, num_heads) = call.q.device, call.q.shape[:2]
        grid = call.grid(self.block_size)
        past, num_free = free_blocks(
            grid, device, density=self.density, sink=self.force_select_first_block
        )
        start = scramble(torch.tensor(self.seed % 2**32))
        start = scramble(start + (0 if call.layer_idx is None else call.layer_idx + 1))
        with stage("selection"):
            heads = scramble(torch.arange(num_heads, device=device) + int(start))
            # Head by head: the ranks of all heads would take as much memory as their scores.
            chosen = torch.stack([_draw(head, grid, past, num_free) for head in heads])
            if self.force_select_first_block:
                chosen[..., 0] = grid.first_positions(device) >= grid.key_tile
            blocks, num_blocks = list_blocks(chosen[None])
        windows = own_windows(grid, device)
        return AttentionPlan(grid, batch, num_heads, blocks, num_blocks, *windows)


def _draw(key: Tensor, grid: BlockGrid, free: Tensor, num_free: Tensor) -> Tensor:
    """The blocks of one head, bool ``[Tq, Tk]``: of the free ones in a row those that rank first.

    Args:
        key: hash of seed, layer and head, int64 ``[]``.
        grid: the tiles.
        free: blocks to draw from, bool ``[Tq, Tk]``.
        num_free: how many to draw in each row, int64 ``[Tq]``.
    """
    rows = grid.first_positions(free.device) // grid.query_tile
    tiles = torch.arange(grid.num_key_tiles, device=free.device)
    ranks = scramble(scramble(rows + key)[:, None] + tiles)
    # 32 bits of hash, then the tile: no two are equal.
    ranks = torch.where(free, (ranks << 31) | tiles, torch.iinfo(torch.int64).max)
    places = (num_free - 1).clamp(min=0)[:, None]
    last = ranks.sort(dim=-1).values.gather(-1, places)
    return free & (ranks <= last) & (num_free[:, None] > 0)


@lru_cache(maxsize=16)
def free_blocks(
    grid: BlockGrid, device: torch.device, *, density: float, sink: bool
) -> tuple[Tensor, Tensor]:
    """What each query tile may draw from, and how many blocks it draws.

    Kept, since every layer of a model asks for the same ones. Do not write into them.

    Returns:
        Blocks before the query tile, without the first one if that is forced (``sink``), bool
        ``[Tq, Tk]``, and counts, int64 ``[Tq]``.
    """
    # The query tiles before these ones count as well: all of a prompt has the density.
    whole = BlockGrid(grid.num_keys - grid.offset % grid.query_tile, grid.num_keys,
                      grid.query_tile, grid.key_tile)  # fmt: skip
    past = whole.past_tiles()
    causal = whole.last_positions() // whole.key_tile + 1
    forced = causal - past.sum(dim=-1)
    if sink:
        forced = forced + past[:, 0]
        past[:, 0] = False
    targets = (causal.cumsum(0).double() * density + 0.5).floor().long()
    # Computed up to each row: the target, or more where forced blocks made it so.
    ahead = (targets - forced.cumsum(0)).cummax(0).values.clamp(min=0)
    counts = ahead.diff(prepend=ahead.new_zeros(1))
    own = slice(-grid.num_query_tiles, None)
    return past[own].to(device), counts[own].to(device)

"""A method that pays for its own order and selection and then computes an exact share of the tiles.

Times at a stated density need it: what a method selects depends on inputs, and inputs of random
weights mean nothing. Legend: see :mod:`pbs.ops.grid`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pbs.methods.base import AttentionMethod, Call
from pbs.ops.grid import BlockGrid
from pbs.ops.plan import AttentionPlan

# More heads than a layer has: the draws of two seeds have no generator in common.
MAX_HEADS = 1 << 16


class UnreachableDensityError(ValueError):
    """Fewer tiles are asked for than are always computed."""


@dataclass(kw_only=True)
class ControlledDensity(AttentionMethod):
    """Runs another method's order and selection, then replaces the selected tiles by random ones.

    Each query tile gets a share of its earlier tiles in proportion to how many there are, block 0
    first, the others drawn per head: neighbours and heads of a group share no more tiles than
    chance has it, which is hard on caches. The lists are drawn once per shape and outside timed
    calls if the shape has been seen; replacing costs nothing.

    Args:
        method: whose order and selection are paid for; its plan must consist of whole tiles.
        target_density: tiles computed / causal tiles, at least the share of the tiles that are
            always computed; met to the nearest tile.
        seed: of the draw.
        rank: number of this process among those that share the heads, so that each draws for its
            own heads what one process would draw for them.
    """

    method: AttentionMethod
    target_density: float
    seed: int = 0
    rank: int = 0
    _lists: dict[tuple[object, ...], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.backend, self.precision = self.method.backend, self.method.precision
        if not 0 < self.target_density <= 1:
            raise ValueError(f"target_density must lie in (0, 1], got {self.target_density}")

    def select(self, call: Call) -> AttentionPlan:
        """See the base class; a plan that is dense stays so.

        Raises:
            NotImplementedError: the method computes single columns, moves queries, or has windows
                that differ between heads.
            UnreachableDensityError: the density is less than what is always computed.
        """
        own = self.method.select(call)
        if own.is_dense:
            return own
        first_window = own.windows[0, 0, :, 0] // own.grid.key_tile
        if own.windows.shape[1] != 1:
            own, first_window = self._own_tiles_alone(own)
        special = (own.columns, own.query_order, own.local_window)
        if own.windows.shape[1] != 1 or any(x is not None for x in special):
            raise NotImplementedError(
                f"{type(self.method).__name__} does not compute whole tiles of keys with the same "
                "windows in every head; a density can be set for PBS (target='keys'), MeanPooling, "
                "XAttention and Prism"
            )
        key = (own.grid, own.num_heads, own.device, own.windows.shape)
        if key not in self._lists:
            # One shape at a time: at 512K the lists are 0.5 GB.
            self._lists.clear()
            self._lists[key] = random_tiles(
                own.grid,
                own.num_heads,
                first_window=first_window,
                num_windows=int(own.num_windows[0, 0].sum()),
                density=self.target_density,
                seed=self.seed,
                first_head=self.rank * own.num_heads,
            )
        blocks, num_blocks = self._lists[key]
        return replace(own, blocks=blocks, num_blocks=num_blocks)

    def _own_tiles_alone(self, own: AttentionPlan) -> tuple[AttentionPlan, Tensor]:
        """A plan whose heads chose windows in their segment, with each query tile's own one alone.

        The others of a segment count among what may not be drawn: in plan order they are elsewhere.

        Returns:
            The plan, and the key tile of each query tile's segment, int ``[Tq]``; as it was where
            the method has no segments, or query tiles are not aligned with those of keys.
        """
        grid, size = own.grid, getattr(self.method, "segment_size", None)
        if size is None or grid.offset % grid.key_tile or grid.query_tile != grid.key_tile:
            return own, own.windows[0, 0, :, 0] // grid.key_tile
        positions = torch.arange(grid.num_query_tiles, device=own.device) * grid.key_tile
        positions = positions + grid.offset
        windows = positions.to(own.windows.dtype)[None, None, :, None]
        counts = torch.ones_like(windows[..., 0], dtype=own.num_windows.dtype)
        segments = positions // size * size // grid.key_tile
        return replace(own, windows=windows, num_windows=counts), segments


def random_tiles(
    grid: BlockGrid,
    num_heads: int,
    *,
    first_window: Tensor,
    num_windows: int,
    density: float,
    seed: int = 0,
    first_head: int = 0,
) -> tuple[Tensor, Tensor]:
    """Lists of random earlier tiles that make up a density together with the windows.

    Args:
        grid: the tiles.
        num_heads: Hq.
        first_window: key tile of each query tile's first window, int ``[Tq]``; tiles before it
            may be drawn.
        num_windows: windows of one head, of all query tiles together.
        density: tiles computed / causal tiles.
        seed: of the draw.
        first_head: number of the first of these heads in the whole layer.

    Returns:
        Ascending key tiles, int32 ``[1, Hq, Tq, F]``, and counts, int32 ``[1, Hq, Tq]``.

    Raises:
        UnreachableDensityError: the windows alone are denser.
    """
    device = first_window.device
    candidates = first_window.long()
    total = int(candidates.sum())
    wanted = round(density * grid.num_causal_tiles) - num_windows
    if not 0 <= wanted <= total:
        least = num_windows / grid.num_causal_tiles
        most = (num_windows + total) / grid.num_causal_tiles
        raise UnreachableDensityError(
            f"density {density} cannot be had for {grid.num_keys} keys: the windows alone make "
            f"{least:.3f}, everything {most:.3f}"
        )
    counts = _proportional(candidates, wanted, total)
    excluded = torch.arange(grid.num_key_tiles, device=device) >= candidates[:, None]
    width = int(counts.max())
    is_valid = torch.arange(width, device=device) < counts[:, None]
    lists = []
    for head in range(first_head, first_head + num_heads):
        generator = torch.Generator(device).manual_seed(MAX_HEADS * seed + head)
        noise = torch.rand(excluded.shape, generator=generator, device=device)
        noise[:, 0] = -1.0  # the block of token 0 comes first
        drawn = noise.masked_fill_(excluded, 2.0).argsort(dim=1)[:, :width]
        # What is not valid sorts to the end.
        drawn = drawn.masked_fill(~is_valid, grid.num_key_tiles).sort(dim=1).values
        lists.append(drawn.masked_fill(~is_valid, 0).int())
    return torch.stack(lists)[None], counts.int().expand(1, num_heads, -1).contiguous()


def _proportional(candidates: Tensor, wanted: int, total: int) -> Tensor:
    """Integers in [0, candidates] with sum ``wanted``, in proportion to the candidates."""
    if not total:
        return torch.zeros_like(candidates)
    share = candidates.double() * (wanted / total)
    counts = share.floor().long()
    missing = wanted - int(counts.sum())
    # Those cut most get one more; a row that is full already was not cut.
    cut = (share - counts).masked_fill(counts >= candidates, -1.0)
    counts[cut.argsort(descending=True, stable=True)[:missing]] += 1
    return counts

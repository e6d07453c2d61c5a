"""What an attention method decides: which keys every tile of queries attends to.

A method makes an :class:`AttentionPlan`; :func:`pbs.ops.block_sparse_attention` carries it out. The
legend of shape letters is in :mod:`pbs.ops.grid`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pbs.ops.block_selection import list_blocks
from pbs.ops.grid import BlockGrid


@dataclass(frozen=True)
class AttentionPlan:
    """Per (sequence, head, query tile): the key tiles, key windows and key columns to compute.

    Every (query, key) pair is named at most once, so that one softmax over all of them is right.
    Lists are padded to their widest row; ``num_*`` says how many entries of a row are valid. A
    leading or head dimension of size 1 stands for all sequences or heads.

    Attributes:
        grid: tile sizes and token counts.
        batch_size: Z.
        num_heads: Hq.
        blocks: key tiles that every query of the tile sees whole, ascending, int16, int32 or int64
            ``[Z, Hq, Tq, F]`` (int16 from the Triton selection: cast before multiplying). They are
            computed without a mask, on the keys *in plan order*.
        num_blocks: valid entries of ``blocks``, int ``[Z, Hq, Tq]``.
        windows: first keys of windows of ``grid.key_tile`` consecutive keys *in natural order*,
            ascending, int32 or int64 ``[Z, Hq, Tq, W]``. They are computed with the causal mask
            per token. The diagonal is always among them.
        num_windows: valid entries of ``windows``, int ``[Z, Hq, Tq]``.
        columns: single keys in natural order that every query of the tile sees, ascending, int32 or
            int64 ``[Z, Hq, Tq, C]``; None for methods that select whole tiles.
        num_columns: valid entries of ``columns``, int ``[Z, Hq, Tq]``.
        order: original position of the key at each place, int64 ``[Z, Ho, Nk]`` (Ho is Hq or Hkv);
            None when no key moves.
        ordered_keys: k in plan order, ``[Z, Ho, Nk, D]``, if the method has gathered it already for
            its block scores; a kernel may use it instead of gathering again.
        query_order: original row of the query at each place, int64 ``[Z, Hq, Nq]``; None when no
            query moves. Tiles then consist of queries in this order.
        local_window: token rule of A-shape heads, int ``[Hq, 2]``: inside windows a query at
            position n sees key j only if ``j < n_init`` or ``n - j < n_local``. None: no rule.
        is_dense: the plan is plain causal attention, which a dense kernel may compute.
        reason: why it is dense ("" otherwise).
    """

    grid: BlockGrid
    batch_size: int
    num_heads: int
    blocks: Tensor
    num_blocks: Tensor
    windows: Tensor
    num_windows: Tensor
    columns: Tensor | None = None
    num_columns: Tensor | None = None
    order: Tensor | None = None
    ordered_keys: Tensor | None = None
    query_order: Tensor | None = None
    local_window: Tensor | None = None
    is_dense: bool = False
    reason: str = ""

    def __post_init__(self) -> None:
        self._check_shapes()
        if self.blocks.device.type == "cpu":
            self.validate()

    @classmethod
    def from_block_mask(
        cls,
        mask: Tensor,
        grid: BlockGrid,
        *,
        segment_size: int = 0,
        order: Tensor | None = None,
        ordered_keys: Tensor | None = None,
        query_order: Tensor | None = None,
    ) -> AttentionPlan:
        """Build a plan from the selected tiles; what lies on the diagonal is added.

        Args:
            mask: selected tiles, bool ``[Z, Hq, Tq, Tk]``; only tiles fully in the past of their
                query tile count (with ``segment_size``: in segments before its own).
            grid: the tiles.
            segment_size: S if keys move inside segments of S: then each query tile computes all of
                its own segment's keys up to its last row, in natural order. 0: only the tiles its
                own positions touch.
            order: see the class.
            ordered_keys: see the class.
            query_order: see the class; queries then move inside chunks of ``segment_size`` rows.

        Raises:
            ValueError: shapes do not fit the grid.
        """
        expected = (grid.num_query_tiles, grid.num_key_tiles)
        if mask.ndim != 4 or tuple(mask.shape[2:]) != expected:
            raise ValueError(
                f"expected a block mask [Z, Hq, {expected[0]}, {expected[1]}], got "
                f"{tuple(mask.shape)}"
            )
        query_segment = 0 if query_order is None else segment_size
        past = grid.past_tiles(mask.device, segment_size=segment_size, query_segment=query_segment)
        blocks, num_blocks = list_blocks(mask & past)
        return cls.from_lists(
            blocks,
            num_blocks,
            grid,
            segment_size=segment_size,
            order=order,
            ordered_keys=ordered_keys,
            query_order=query_order,
        )

    @classmethod
    def from_lists(
        cls,
        blocks: Tensor,
        num_blocks: Tensor,
        grid: BlockGrid,
        *,
        segment_size: int = 0,
        order: Tensor | None = None,
        ordered_keys: Tensor | None = None,
        query_order: Tensor | None = None,
        local_tiles: int | None = None,
    ) -> AttentionPlan:
        """As :meth:`from_block_mask`, from lists ``[Z, Hq, Tq, F]`` and counts ``[Z, Hq, Tq]``.

        With ``local_tiles`` the own segment is not computed whole: listed tiles of it, in natural
        order, and so many before the diagonal are (see :func:`own_tiles`).
        """
        if local_tiles is None:
            windows, num_windows = own_windows(
                grid,
                blocks.device,
                segment_size=segment_size,
                query_segment=0 if query_order is None else segment_size,
            )
        else:
            bounds = own_tiles(
                grid, blocks.device, segment_size=segment_size, local_tiles=local_tiles
            )
            num_blocks, windows, num_windows = _split_own(blocks, num_blocks, grid, bounds)
        return cls(
            grid,
            blocks.shape[0],
            blocks.shape[1],
            blocks,
            num_blocks,
            windows,
            num_windows,
            order=order,
            ordered_keys=ordered_keys,
            query_order=query_order,
        )

    @classmethod
    def dense(
        cls,
        grid: BlockGrid,
        batch_size: int,
        num_heads: int,
        *,
        device: torch.device | str,
        reason: str,
    ) -> AttentionPlan:
        """Plain causal attention as a plan; ``reason`` says why the method chose it."""
        return cls(
            grid,
            batch_size,
            num_heads,
            *_dense_lists(grid, torch.device(device)),
            is_dense=True,
            reason=reason,
        )

    def num_tiles(self) -> Tensor:
        """Tiles computed per head, int64 ``[Z, Hq]``.

        Columns are gathered ``key_tile`` at a time, the last tile of a row rounded up.
        """
        tiles = self.num_blocks.long().sum(-1) + self.num_windows.long().sum(-1)
        if self.num_columns is not None:
            width = self.grid.key_tile
            tiles = tiles + ((self.num_columns.long() + width - 1) // width).sum(-1)
        return tiles.expand(self.batch_size, self.num_heads)

    def density(self) -> Tensor:
        """Tiles computed / tiles dense causal attention computes, fp32 ``[Z, Hq]``.

        Masked corners and padding of computed tiles count as computed. Sparsity is 1 - density.
        """
        return self.num_tiles().float() / self.grid.num_causal_tiles

    def block_mask(self) -> Tensor:
        """Tiles that get computed, bool ``[Z, Hq, Tq, Tk]``, key tiles in plan order.

        A window that is not aligned to tiles, and every column, marks all tiles it touches.
        """
        grid = self.grid
        shape = (self.batch_size, self.num_heads, grid.num_query_tiles, grid.num_key_tiles + 1)
        mask = torch.zeros(shape, dtype=torch.bool, device=self.device)
        drop = grid.num_key_tiles
        _mark(mask, self.blocks, self.num_blocks, drop)
        _mark(mask, self.windows // grid.key_tile, self.num_windows, drop)
        last = (self.windows + grid.key_tile - 1).clamp(max=grid.num_keys - 1)
        _mark(mask, last // grid.key_tile, self.num_windows, drop)
        if self.columns is not None and self.num_columns is not None:
            _mark(mask, self.columns // grid.key_tile, self.num_columns, drop)
        return mask[..., :-1]

    def key_order(self) -> Tensor:
        """Original position of the key at each place, int64 ``[Z, Hq, Nk]``."""
        if self.order is None:
            identity = torch.arange(self.grid.num_keys, device=self.device)
            return identity.expand(self.batch_size, self.num_heads, -1)
        return self.order.repeat_interleave(self.num_heads // self.order.shape[1], dim=1)

    def query_positions(self) -> Tensor:
        """Position of the query in each row of the tiles, int64 ``[.., .., Tq * query_tile]``.

        Rows past the last query hold -1: they see nothing.
        """
        grid = self.grid
        rows = torch.arange(grid.num_query_tiles * grid.query_tile, device=self.device)
        padding = rows >= grid.num_queries
        if self.query_order is None:
            return (rows + grid.offset).masked_fill(padding, -1)[None, None]
        positions = self.query_order + grid.offset
        return torch.nn.functional.pad(positions, (0, len(rows) - grid.num_queries), value=-1)

    def token_mask(self) -> Tensor:
        """The pairs that enter the softmax, at original positions, bool ``[Z, Hq, Nq, Nk]``.

        For tests, pictures and the reference backend: N x N memory.
        """
        grid = self.grid
        rows = self.query_positions()
        rows = rows.unflatten(-1, (grid.num_query_tiles, grid.query_tile)).unsqueeze(-1)
        places = _expand_ranges(self.blocks.long() * grid.key_tile, self.num_blocks, grid.key_tile)
        order = self.key_order()
        hits = places >= 0
        whole = (
            order.unsqueeze(2)
            .expand(-1, -1, grid.num_query_tiles, -1)
            .gather(-1, places.clamp(min=0).expand(*order.shape[:2], -1, -1))
        )
        whole = torch.where(hits, whole, -1)
        keys = _expand_ranges(self.windows, self.num_windows, grid.key_tile)
        keys = torch.where(keys < grid.num_keys, keys, -1)
        parts = [whole.unsqueeze(-2), keys.unsqueeze(-2)]
        visible = [parts[0] >= 0, (parts[1] >= 0) & self._sees(rows, parts[1])]
        if self.columns is not None and self.num_columns is not None:
            columns = _expand_ranges(self.columns, self.num_columns, 1).unsqueeze(-2)
            parts.append(columns)
            visible.append(columns >= 0)
        shape = (*order.shape[:2], grid.num_query_tiles, grid.query_tile)
        mask = torch.zeros(*shape, grid.num_keys, dtype=torch.int32, device=self.device)
        for tokens, seen in zip(parts, visible, strict=True):
            seen = seen & (rows >= 0)
            mask.scatter_add_(
                -1,
                tokens.clamp(min=0).expand(*shape, -1),
                seen.int().expand(*shape, -1),
            )
        if int(mask.max()) > 1:
            raise ValueError("inconsistent plan: a (query, key) pair is named more than once")
        mask = mask.flatten(2, 3)[:, :, : grid.num_queries].bool()
        if self.query_order is None:
            return mask
        restored = torch.empty_like(mask)
        index = self.query_order.unsqueeze(-1).expand_as(mask)
        return restored.scatter_(2, index, mask)

    def validate(self) -> None:
        """Check the values, not only the shapes; on a GPU this synchronises.

        Raises:
            ValueError: a list is not ascending, an entry lies outside the keys, a tile is not in
                its query tile's past, or an order is no permutation.
        """
        grid = self.grid
        self._check_list("blocks", self.blocks, self.num_blocks, step=1, stop=grid.num_key_tiles)
        self._check_list(
            "windows", self.windows, self.num_windows, step=grid.key_tile, stop=grid.num_keys
        )
        first = grid.first_positions(self.device)[:, None]
        if self.query_order is None:
            ends = (self.blocks.long() + 1) * grid.key_tile
            late = _valid(self.blocks, self.num_blocks) & (ends > first)
            if bool(late.any()):
                raise ValueError(
                    "inconsistent plan: a tile of `blocks` reaches past the first query of its "
                    "tile; tiles on the diagonal belong into `windows`"
                )
        if self.columns is not None and self.num_columns is not None:
            self._check_list("columns", self.columns, self.num_columns, step=1, stop=grid.num_keys)
            late = _valid(self.columns, self.num_columns) & (self.columns > first)
            if bool(late.any()):
                raise ValueError(
                    "inconsistent plan: a column lies after the first query of its tile"
                )
        for name, order, count in (
            ("order", self.order, grid.num_keys),
            ("query_order", self.query_order, grid.num_queries),
        ):
            if order is not None:
                expected = torch.arange(count, device=order.device).expand_as(order)
                if not torch.equal(order.sort(-1).values, expected):
                    raise ValueError(f"inconsistent plan: {name} is not a permutation of {count}")

    @property
    def device(self) -> torch.device:
        """Where the lists lie."""
        return self.blocks.device

    def _sees(self, positions: Tensor, keys: Tensor) -> Tensor:
        """Causality and the token rule inside windows, broadcast over positions and keys."""
        seen = keys <= positions
        if self.local_window is not None:
            init, local = self.local_window[:, :, None, None, None].unbind(1)
            seen = seen & ((keys < init) | (positions - keys < local))
        return seen

    def _check_shapes(self) -> None:
        grid = self.grid
        lists = [
            ("blocks", self.blocks, self.num_blocks),
            ("windows", self.windows, self.num_windows),
        ]
        if (self.columns is None) != (self.num_columns is None):
            raise ValueError("columns and num_columns go together: got only one of them")
        if self.columns is not None and self.num_columns is not None:
            lists.append(("columns", self.columns, self.num_columns))
        for name, entries, counts in lists:
            if (
                entries.ndim != 4
                or entries.shape[:3] != counts.shape
                or entries.shape[2] != grid.num_query_tiles
                or entries.shape[0] not in (1, self.batch_size)
                or entries.shape[1] not in (1, self.num_heads)
            ):
                raise ValueError(
                    f"expected {name} [{self.batch_size}, {self.num_heads}, "
                    f"{grid.num_query_tiles}, width] (or 1 in the first two places) with counts "
                    f"of the same leading shape, got {tuple(entries.shape)} and "
                    f"{tuple(counts.shape)}"
                )
            if entries.is_floating_point() or counts.is_floating_point():
                raise TypeError(f"expected integer {name}, got {entries.dtype} and {counts.dtype}")
            # Windows and columns are positions, which 16 bits do not hold; blocks are tiles.
            if name != "blocks" and entries.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"expected {name} of at least 32 bits, got {entries.dtype}")
        if self.order is not None and (
            self.order.ndim != 3
            or self.order.shape[-1] != grid.num_keys
            or self.num_heads % self.order.shape[1]
        ):
            raise ValueError(
                f"expected order [Z, Ho, {grid.num_keys}], got {tuple(self.order.shape)}"
            )
        if self.query_order is not None and (
            self.query_order.ndim != 3 or self.query_order.shape[-1] != grid.num_queries
        ):
            raise ValueError(
                f"expected query_order [Z, Hq, {grid.num_queries}], got "
                f"{tuple(self.query_order.shape)}"
            )

    def _check_list(
        self, name: str, entries: Tensor, counts: Tensor, *, step: int, stop: int
    ) -> None:
        """Ascending, inside [0, stop), no more valid entries than the list is wide."""
        if entries.shape[-1] == 0:
            if bool((counts != 0).any()):
                raise ValueError(f"inconsistent plan: num_{name} is not 0 but {name} is empty")
            return
        if bool(((counts < 0) | (counts > entries.shape[-1])).any()):
            raise ValueError(f"inconsistent plan: num_{name} outside [0, {entries.shape[-1]}]")
        valid = _valid(entries, counts)
        outside = (entries < 0) | (entries >= stop)
        if bool((outside & valid).any()):
            raise ValueError(f"inconsistent plan: {name} has entries outside [0, {stop})")
        falling = (entries[..., 1:] < entries[..., :-1] + step) & valid[..., 1:]
        if bool(falling.any()):
            raise ValueError(f"inconsistent plan: {name} must ascend by at least {step}")


@lru_cache(maxsize=16)
def own_windows(
    grid: BlockGrid,
    device: torch.device,
    *,
    segment_size: int = 0,
    query_segment: int = 0,
) -> tuple[Tensor, Tensor]:
    """Windows over the keys around the diagonal: of the tiles a query tile touches, or its segment.

    Made on the CPU, without waiting for the device, and kept: every layer of a model asks for the
    same ones, and their plans share these tensors. Do not write into them.

    Returns:
        First keys, int32 ``[1, 1, Tq, W]``, and counts, int32 ``[1, 1, Tq]``.
    """
    unit = segment_size or grid.key_tile
    first = grid.first_positions(query_segment=query_segment)
    first_tile = first // unit * unit // grid.key_tile
    last_tile = grid.last_positions(query_segment=query_segment) // grid.key_tile
    counts = (last_tile - first_tile + 1).int()
    width = int(counts.max())
    tiles = first_tile[:, None] + torch.arange(width)
    starts = torch.where(tiles <= last_tile[:, None], tiles * grid.key_tile, 0)
    return starts.int()[None, None].to(device), counts[None, None].to(device)


@dataclass(frozen=True)
class OwnTiles:
    """Which key tiles of its own segment a query tile may choose, and which it computes anyway.

    All counts, int32 ``[Tq]``; tiles of the own segment are in natural order.

    Attributes:
        starts: tiles before the own segment; those that follow, up to ``limits``, may be chosen.
        limits: tiles before the first that is computed in any case.
        ends: one past the last tile that the query tile sees.
        width: tiles of the widest own segment.
    """

    starts: Tensor
    limits: Tensor
    ends: Tensor
    width: int


@lru_cache(maxsize=16)
def own_tiles(
    grid: BlockGrid, device: torch.device, *, segment_size: int, local_tiles: int
) -> OwnTiles:
    """The tiles around the diagonal where the own segment is chosen from instead of computed whole.

    Kept, as :func:`own_windows` are. Do not write into them.

    Args:
        grid: the tiles.
        device: where the counts go.
        segment_size: S, a multiple of the key tile.
        local_tiles: how many tiles before the diagonal are computed in any case, as far as they
            lie in the own segment.
    """
    first = grid.first_positions()
    starts = first // segment_size * segment_size // grid.key_tile
    limits = torch.maximum(starts, first // grid.key_tile - local_tiles)
    ends = grid.last_positions() // grid.key_tile + 1
    width = int((ends - starts).max())
    starts, limits, ends = (count.int().to(device) for count in (starts, limits, ends))
    return OwnTiles(starts, limits, ends, width)


def _split_own(
    blocks: Tensor, num_blocks: Tensor, grid: BlockGrid, own: OwnTiles
) -> tuple[Tensor, Tensor, Tensor]:
    """Lists of tiles, the own ones last, as a shorter count of them, windows and their count."""
    slots = torch.arange(blocks.shape[-1], device=blocks.device)
    is_own = (slots < num_blocks.unsqueeze(-1)) & (blocks >= own.starts[:, None])
    num_own = is_own.sum(dim=-1, dtype=torch.int32)
    num_past = num_blocks.int() - num_own
    slots = torch.arange(own.width, dtype=torch.int32, device=blocks.device)
    rest = own.limits[:, None] + slots - num_own.unsqueeze(-1)
    if blocks.shape[-1]:
        places = (num_past.unsqueeze(-1) + slots).clamp(max=blocks.shape[-1] - 1)
        rest = torch.where(slots < num_own.unsqueeze(-1), blocks.gather(-1, places.long()), rest)
    counts = num_own + own.ends - own.limits
    windows = torch.where(slots < counts.unsqueeze(-1), rest.int() * grid.key_tile, 0)
    return num_past, windows, counts


@lru_cache(maxsize=2)
def _dense_lists(grid: BlockGrid, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Blocks and windows of plain causal attention; kept, so that a dense call costs nothing."""
    blocks, num_blocks = list_blocks(grid.past_tiles(device)[None, None])
    return blocks, num_blocks, *own_windows(grid, device)


def _valid(entries: Tensor, counts: Tensor) -> Tensor:
    return torch.arange(entries.shape[-1], device=entries.device) < counts.unsqueeze(-1)


def _mark(mask: Tensor, tiles: Tensor, counts: Tensor, drop: int) -> None:
    """Set the tiles of every row; invalid entries go to the place ``drop``."""
    tiles = torch.where(_valid(tiles, counts), tiles, drop).long()
    mask.scatter_(-1, tiles.expand(*mask.shape[:3], -1), True)


def _expand_ranges(starts: Tensor, counts: Tensor, length: int) -> Tensor:
    """Members of the ranges [start, start + length), int64 ``[..., width * length]``; -1 pads."""
    members = starts.long().unsqueeze(-1) + torch.arange(length, device=starts.device)
    members = torch.where(_valid(starts, counts).unsqueeze(-1), members, -1)
    return members.flatten(-2)

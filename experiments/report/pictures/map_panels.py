"""One head's attention as a map of cells, with the tiles that a plan computes drawn over it.

Legend of shapes: :mod:`pbs.ops.grid`; P cells along a side of the picture, each ``cell`` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from experiments.gate.coverage import measure_coverage
from experiments.report.pictures.capture import causal_probabilities, future_keys
from pbs.ops.plan import AttentionPlan

# Cells along a side at most: each stays a pixel or more of the picture.
MAX_CELLS = 512
# The colour bar spans at most this many decades.
MAX_DECADES = 5
MAP_COLOURS = "Blues"
# Laid over what is not computed: grey 128 of 255, that opaque.
SKIPPED_GREY = 0.5
SKIPPED_OPACITY = 0.5


def moves_tokens(plan: AttentionPlan) -> bool:
    """Whether keys or queries leave their natural order."""
    return plan.order is not None or plan.query_order is not None


def check_maps(
    q: Tensor,
    k: Tensor,
    *,
    heads: Sequence[int],
    sequence: int,
    max_tokens: int | None,
    before: AttentionPlan | None,
) -> None:
    """Check the arguments of maps.

    Raises:
        ValueError: a head, a sequence or a number of tokens that does not exist, or a plan before
            that moves keys.
    """
    named = [*(("head", head, q.shape[1]) for head in heads), ("sequence", sequence, q.shape[0])]
    for name, value, stop in named:
        if not 0 <= value < stop:
            raise ValueError(f"{name} must lie in [0, {stop}), got {value}")
    offset = k.shape[2] - q.shape[2]
    if max_tokens is not None and max_tokens <= offset:
        raise ValueError(
            f"max_tokens must be above {offset}, the keys before the first query, got {max_tokens}"
        )
    if before is not None and moves_tokens(before):
        raise ValueError("plan_before must leave keys and queries in natural order; it moves some")


@dataclass(frozen=True)
class MapView:
    """What a map shows of one head.

    Attributes:
        q: ``[1, Hq, Nq, D]``.
        k: ``[1, Hkv, Nk, D]``.
        scale: factor of the logits.
        head: query head.
        stop: one past the last key to draw, above the offset of the first query.
        max_cells: along a side.
    """

    q: Tensor
    k: Tensor
    scale: float
    head: int
    stop: int
    max_cells: int = MAX_CELLS

    @property
    def offset(self) -> int:
        """Keys before the first query."""
        return self.k.shape[2] - self.q.shape[2]

    @property
    def cell(self) -> int:
        """Tokens per cell: a power of two, so that cells do not straddle tiles."""
        return 1 << max(0, (self.stop - 1) // self.max_cells).bit_length()

    @property
    def is_whole(self) -> bool:
        """Whether nothing is cut off."""
        return self.stop == self.k.shape[2]

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Borders of the cells in tokens: left, right, bottom, top."""
        rows = -(-(self.stop - self.offset) // self.cell) * self.cell
        columns = -(-self.stop // self.cell) * self.cell
        return 0, columns, self.offset + rows, self.offset

    def weights(self, plan: AttentionPlan | None) -> np.ma.MaskedArray:
        """Largest probability of each cell, masked where the keys are in the future.

        Rows and keys stand in the order of the (one-head) plan, or in natural order for None.
        """
        groups = self.q.shape[1] // self.k.shape[1]
        keys = self.k[0, self.head // groups]
        positions = torch.arange(self.offset, self.stop, device=keys.device)
        if plan is not None and plan.query_order is not None:
            positions = plan.query_order[0, 0, : self.stop - self.offset] + self.offset
        natural_from = None if plan is None or plan.order is None else _natural_from(plan)
        # A multiple of the cell, so that chunks end with a row of cells.
        chunk_rows = max(256, self.cell)
        parts = []
        for start in range(0, len(positions), chunk_rows):
            own = positions[start : start + chunk_rows]
            q = self.q[0, self.head, own - self.offset]
            weights = causal_probabilities(q, keys[: int(own.max()) + 1], own, self.scale)
            weights = weights.masked_fill_(future_keys(weights, own), -1.0)
            weights = torch.nn.functional.pad(weights, (0, len(keys) - weights.shape[1]), value=-1)
            if natural_from is not None:
                rows = torch.arange(start, start + len(own)) // plan.grid.query_tile
                places = torch.arange(len(keys), device=keys.device)
                is_natural = places >= natural_from[rows, None]
                order = torch.where(is_natural, places, plan.order[0, 0])
                weights = weights.gather(1, order)
            parts.append(pool_cells(weights[:, : self.stop], self.cell))
        cells = torch.cat(parts).cpu().numpy()
        return np.ma.masked_less(cells, 0)

    def computed(self, plan: AttentionPlan) -> np.ndarray:
        """Cells with a computed tile in them, bool, axes as in ``weights`` of the same plan."""
        grid = plan.grid
        keys = torch.zeros(grid.num_query_tiles, grid.num_keys, dtype=torch.float32)
        lists = [
            (plan.blocks * grid.key_tile, plan.num_blocks, grid.key_tile),
            (plan.windows, plan.num_windows, grid.key_tile),
        ]
        if plan.columns is not None and plan.num_columns is not None:
            lists.append((plan.columns, plan.num_columns, 1))
        for starts, counts, length in lists:
            for tile, count in enumerate(counts[0, 0].tolist()):
                for start in starts[0, 0, tile, :count].tolist():
                    keys[tile, start : start + length] = 1.0
        rows = torch.arange(self.stop - self.offset) // grid.query_tile
        wide = pool_cells(keys[:, : self.stop], self.cell, rows=False)
        return pool_cells(wide[rows], self.cell, columns=False).numpy() > 0


def one_head(plan: AttentionPlan, sequence: int, head: int) -> AttentionPlan:
    """The plan of one head of one sequence."""

    def pick(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        own = tensor[sequence if tensor.shape[0] > 1 else 0]
        own = own[head // (plan.num_heads // own.shape[0])]
        return own[None, None]

    return replace(
        plan,
        batch_size=1,
        num_heads=1,
        blocks=pick(plan.blocks),
        num_blocks=pick(plan.num_blocks),
        windows=pick(plan.windows),
        num_windows=pick(plan.num_windows),
        columns=pick(plan.columns),
        num_columns=pick(plan.num_columns),
        order=pick(plan.order),
        ordered_keys=None,
        query_order=pick(plan.query_order),
        local_window=None if plan.local_window is None else plan.local_window[head, None],
    )


def _natural_from(plan: AttentionPlan) -> Tensor:
    """First key of each tile's unbroken stretch of windows up to the diagonal, int64 ``[Tq]``."""
    starts = []
    for tile in range(plan.grid.num_query_tiles):
        windows = plan.windows[0, 0, tile, : int(plan.num_windows[0, 0, tile])].tolist()
        start = windows.pop()
        while windows and windows[-1] + plan.grid.key_tile == start:
            start = windows.pop()
        starts.append(start)
    return torch.tensor(starts, device=plan.device)


def pool_cells(x: Tensor, cell: int, *, rows: bool = True, columns: bool = True) -> Tensor:
    """Maximum of each cell; what is missing in the last cells does not count."""
    high, wide = (cell if rows else 1), (cell if columns else 1)
    padding = (0, -x.shape[1] % wide, 0, -x.shape[0] % high)
    padded = torch.nn.functional.pad(x, padding, value=-1.0)
    return padded.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).amax(dim=(1, 3))


def draw_panel(
    axes: Axes,
    view: MapView,
    axes_plan: AttentionPlan | None,
    tiles_plan: AttentionPlan | None,
    norm: LogNorm | None = None,
) -> AxesImage:
    """Draw one map with the tiles of a plan over it.

    Args:
        axes: to draw on.
        view: what to draw.
        axes_plan: rows and keys stand in the order of this one-head plan; None: in natural order.
        tiles_plan: the one-head plan whose skipped tiles are greyed out; None greys none.
        norm: of the colours; default: from this map.
    """
    weights = view.weights(axes_plan)
    if norm is None:
        norm = _norm_of(weights)
    # Probabilities below the smallest colour, zeros too, get that colour.
    drawn = np.ma.maximum(weights, norm.vmin)
    image = axes.imshow(
        drawn, cmap=MAP_COLOURS, norm=norm, extent=view.extent, interpolation="nearest"
    )
    if tiles_plan is not None:
        computed = view.computed(tiles_plan)
        veil = np.full((*computed.shape, 4), SKIPPED_GREY)
        veil[..., 3] = np.where(computed | weights.mask, 0.0, SKIPPED_OPACITY)
        axes.imshow(veil, extent=view.extent, interpolation="nearest")
    axes.plot([view.offset, view.stop], [view.offset, view.stop], color="black", linewidth=1.2)
    axes.set_xlim(0, view.stop)
    axes.set_ylim(view.stop, view.offset)
    return image


def shares_of(view: MapView, plan: AttentionPlan) -> tuple[float, float]:
    """Density and coverage of the whole head under a one-head plan."""
    coverage = measure_coverage(
        view.q[:, view.head : view.head + 1],
        view.k[:, view.head // (view.q.shape[1] // view.k.shape[1]), None],
        plan,
        scale=view.scale,
    )
    return float(plan.density()), float(coverage)


def common_norm(views: Sequence[MapView]) -> LogNorm:
    """Colours for several heads side by side, so that one bar says what they mean."""
    norms = [_norm_of(view.weights(None)) for view in views]
    high = max(norm.vmax for norm in norms)
    low = min(norm.vmin for norm in norms)
    return LogNorm(vmin=max(low, high * 10.0**-MAX_DECADES), vmax=high)


def _norm_of(weights: np.ma.MaskedArray) -> LogNorm:
    """Colours from the 10th to the 99.9th percentile of the cells, one decade up to five."""
    low, high = np.quantile(weights.compressed(), [0.1, 0.999])
    return LogNorm(vmin=min(max(low, high * 10.0**-MAX_DECADES), high / 10), vmax=high)


def map_legend() -> list[Patch | Line2D]:
    """What the colours of a map mean."""
    return [
        Patch(facecolor="#9ECAE1", label="computed tiles"),
        Patch(facecolor="#A8B5BE", label="skipped tiles (greyed out)"),
        Line2D([], [], color="black", linewidth=1.2, label="causal boundary (future keys: white)"),
    ]

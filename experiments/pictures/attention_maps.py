"""Attention maps of one head before and after the permutation, with the computed tiles over them.

Legend of shapes: :mod:`pbs.ops.grid`; P cells along a side of the picture, each ``cell`` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from experiments.coverage import measure_coverage
from experiments.pictures.capture import causal_probabilities, future_keys
from experiments.pictures.looks import new_figure, save
from pbs.ops.plan import AttentionPlan

# Cells along a side at most: each stays a pixel or more of the picture.
MAX_CELLS = 512
# The colour bar spans at most this many decades.
MAX_DECADES = 5
COMPUTED_COLOUR = "#D55E00"
MAP_COLOURS = "Blues"
# Laid over what is not computed: grey 128 of 255, that opaque.
SKIPPED_GREY = 0.5
SKIPPED_OPACITY = 0.5


def draw_attention_maps(
    q: Tensor,
    k: Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    head: int,
    path: str | Path,
    title: str,
    max_tokens: int | None = None,
    plan_before: AttentionPlan | None = None,
    sequence: int = 0,
) -> Path:
    """One head's dense attention before and after the permutation, with the computed tiles.

    Left the keys stand in natural order, with the tiles of ``plan_before``; right in plan order,
    with those of ``plan``. A cell shows the *largest* probability in it, so that vertical lines
    stay visible however many tokens share it; colours are logarithmic. Keys that a query tile
    computes around its diagonal (its own segment, for PBS) are computed in natural order, and drawn
    so on both sides. Density and coverage in the panel titles are those of the whole head, also
    when only a part is drawn.

    Args:
        q: ``[Z, Hq, Nq, D]``.
        k: ``[Z, Hkv, Nk, D]``.
        plan: what is computed.
        scale: factor of the logits.
        head: query head to draw.
        path: where the PNG goes; missing folders are made.
        title: first line of the title, such as "tiny, layer 1, head 3: needle at 8K".
        max_tokens: draw only the first this many keys and the queries at their positions. The map
            needs no such limit, but the tiles of long prompts get small.
        plan_before: what is computed without the permutation, for instance by the same method with
            ``order="none"``; None draws no tiles on the left.
        sequence: which of the Z.

    Returns:
        Where the picture is.

    Raises:
        ValueError: a head, a sequence or a number of tokens that does not exist, plans that do not
            fit the tensors, or a ``plan_before`` that moves keys.
    """
    for name, value, stop in (("head", head, q.shape[1]), ("sequence", sequence, q.shape[0])):
        if not 0 <= value < stop:
            raise ValueError(f"{name} must lie in [0, {stop}), got {value}")
    num_keys, offset = k.shape[2], k.shape[2] - q.shape[2]
    if max_tokens is not None and max_tokens <= offset:
        raise ValueError(
            f"max_tokens must be above {offset}, the keys before the first query, got {max_tokens}"
        )
    if plan_before is not None and not (plan_before.order is plan_before.query_order is None):
        raise ValueError("plan_before must leave keys and queries in natural order; it moves some")
    stop = num_keys if max_tokens is None else min(max_tokens, num_keys)
    view = _View(q[sequence : sequence + 1], k[sequence : sequence + 1], scale, head, offset, stop)
    after = _one_head(plan, sequence, head)
    before = None if plan_before is None else _one_head(plan_before, sequence, head)

    figure = new_figure(13.0, 7.0)
    panels = figure.subplots(1, 2)
    part = f"first {stop:,} of " if stop < num_keys else ""
    figure.suptitle(f"{title} ({part}{num_keys:,} tokens)", fontsize=14)
    if plan.order is None and plan.query_order is None:
        headings = ("Keys in natural order", "The same keys: this plan moves none")
        place = "key position (tokens)"
    else:
        headings = ("Before: keys in natural order", "After: keys in plan order")
        place = "key place in plan order (tokens)"
    image = _draw_panel(panels[0], view, None, before, headings[0])
    _draw_panel(panels[1], view, after, after, headings[1], norm=image.norm)
    panels[0].set_xlabel("key position (tokens)", fontsize=11)
    panels[1].set_xlabel(place, fontsize=11)
    panels[0].set_ylabel("query position (tokens)", fontsize=11)
    bar = figure.colorbar(image, ax=list(panels), shrink=0.85, pad=0.01, extend="both")
    label = "attention probability, largest in each cell"
    bar.set_label(f"{label} of {view.cell} x {view.cell} tokens" if view.cell > 1 else label)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=4, fontsize=11)
    return save(figure, path)


@dataclass(frozen=True)
class _View:
    """What both panels draw: one head's q and k, and which positions."""

    q: Tensor  # [1, Hq, Nq, D]
    k: Tensor  # [1, Hkv, Nk, D]
    scale: float
    head: int
    offset: int
    stop: int

    @property
    def cell(self) -> int:
        """Tokens per cell: a power of two, so that cells do not straddle tiles."""
        return 1 << max(0, (self.stop - 1) // MAX_CELLS).bit_length()

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
                places = torch.arange(len(keys))
                is_natural = places >= natural_from[rows, None]
                order = torch.where(is_natural, places, plan.order[0, 0])
                weights = weights.gather(1, order.to(weights.device))
            parts.append(_pool(weights[:, : self.stop], self.cell))
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
        wide = _pool(keys[:, : self.stop], self.cell, rows=False)
        return _pool(wide[rows], self.cell, columns=False).numpy() > 0


def _one_head(plan: AttentionPlan, sequence: int, head: int) -> AttentionPlan:
    """The plan of one head of one sequence, on the CPU."""

    def pick(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        own = tensor[sequence if tensor.shape[0] > 1 else 0]
        own = own[head // (plan.num_heads // own.shape[0])]
        return own[None, None].cpu()

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
        local_window=None if plan.local_window is None else plan.local_window[head, None].cpu(),
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
    return torch.tensor(starts)


def _pool(x: Tensor, cell: int, *, rows: bool = True, columns: bool = True) -> Tensor:
    """Maximum of each cell; what is missing in the last cells does not count."""
    high, wide = (cell if rows else 1), (cell if columns else 1)
    padding = (0, -x.shape[1] % wide, 0, -x.shape[0] % high)
    padded = torch.nn.functional.pad(x, padding, value=-1.0)
    return padded.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).amax(dim=(1, 3))


def _draw_panel(
    axes: Axes,
    view: _View,
    axes_plan: AttentionPlan | None,
    tiles_plan: AttentionPlan | None,
    heading: str,
    norm: LogNorm | None = None,
) -> AxesImage:
    """One map with the tiles of a plan over it."""
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
        lines = LineCollection(
            _outlines(computed, view), colors=COMPUTED_COLOUR, linewidths=1.1, capstyle="projecting"
        )
        axes.add_collection(lines, autolim=False)
        coverage = measure_coverage(
            view.q[:, view.head : view.head + 1],
            view.k[:, view.head // (view.q.shape[1] // view.k.shape[1]), None],
            tiles_plan,
            scale=view.scale,
        )
        density = float(tiles_plan.density())
        share = "computed" if view.is_whole else "whole head"
        heading += f"\n{share}: {density:.1%} of causal tiles, {float(coverage):.1%} of attention"
    axes.plot([view.offset, view.stop], [view.offset, view.stop], color="black", linewidth=1.2)
    axes.set_xlim(0, view.stop)
    axes.set_ylim(view.stop, view.offset)
    axes.set_title(heading, fontsize=12)
    return image


def _norm_of(weights: np.ma.MaskedArray) -> LogNorm:
    """Colours from the 10th to the 99.9th percentile of the cells, one decade up to five."""
    low, high = np.quantile(weights.compressed(), [0.1, 0.999])
    return LogNorm(vmin=min(max(low, high * 10.0**-MAX_DECADES), high / 10), vmax=high)


def _outlines(computed: np.ndarray, view: _View) -> list[list[tuple[float, float]]]:
    """Borders between computed and other cells as straight lines in tokens, as few as possible."""
    padded = np.pad(computed, 1)
    lines = []
    for index, changes in enumerate(np.diff(padded.astype(np.int8), axis=0)[:, 1:-1]):
        y = view.offset + index * view.cell
        lines += [[(a * view.cell, y), (b * view.cell, y)] for a, b in _stretches(changes)]
    for index, changes in enumerate(np.diff(padded.astype(np.int8), axis=1)[1:-1].T):
        x = index * view.cell
        lines += [
            [(x, view.offset + a * view.cell), (x, view.offset + b * view.cell)]
            for a, b in _stretches(changes)
        ]
    return lines


def _stretches(values: np.ndarray) -> list[tuple[int, int]]:
    """First and one past the last index of each stretch of values that are not 0."""
    edges = np.flatnonzero(np.diff(np.pad((values != 0).astype(np.int8), 1)))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _legend() -> list[Patch | Line2D]:
    return [
        Patch(
            facecolor="#9ECAE1", edgecolor=COMPUTED_COLOUR, linewidth=1.5, label="computed tiles"
        ),
        Patch(facecolor="#A8B5BE", label="skipped tiles (greyed out)"),
        Line2D([], [], color="black", linewidth=1.2, label="causal boundary (future keys: white)"),
    ]

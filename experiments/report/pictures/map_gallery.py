"""Attention maps of many heads of a layer, before and after the permutation, as one picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from experiments.report.pictures.looks import new_figure, save
from experiments.report.pictures.map_panels import (
    MAP_COLOURS,
    MapView,
    check_maps,
    common_norm,
    draw_panel,
    map_legend,
    moves_tokens,
    one_head,
    shares_of,
)
from pbs.ops.plan import AttentionPlan

NUM_COLUMNS = 4
# Cells along a side of the small maps.
MAX_CELLS = 256


def draw_map_gallery(
    q: Tensor,
    k: Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    heads: Sequence[int],
    path: str | Path,
    title: str,
    max_tokens: int | None = None,
    plan_before: AttentionPlan | None = None,
    sequence: int = 0,
) -> Path:
    """Heads side by side: above the keys in natural order, below in plan order.

    Args:
        q: ``[Z, Hq, Nq, D]``.
        k: ``[Z, Hkv, Nk, D]``.
        plan: what is computed. One that moves nothing has one map per head.
        scale: factor of the logits.
        heads: query heads, in the order they are drawn.
        path: where the PNG goes; missing folders are made.
        title: above the picture.
        max_tokens: draw only the first this many keys and the queries at their positions.
        plan_before: what is computed without the permutation; None draws no tiles above.
        sequence: which of the Z.

    Returns:
        Where the picture is.

    Raises:
        ValueError: no heads, or what :func:`draw_attention_maps` refuses.
    """
    if not heads:
        raise ValueError("no heads to draw")
    check_maps(q, k, heads=heads, sequence=sequence, max_tokens=max_tokens, before=plan_before)
    is_pair = moves_tokens(plan)
    num_columns = min(NUM_COLUMNS, len(heads))
    num_groups = -(-len(heads) // num_columns)
    num_rows = num_groups * (2 if is_pair else 1)
    figure = new_figure(max(8.0, 4.0 * num_columns), 4.2 * num_rows + 1.2)
    figure.get_layout_engine().set(h_pad=0.12)
    panels = figure.subplots(num_rows, num_columns, squeeze=False)
    stop = k.shape[2] if max_tokens is None else min(max_tokens, k.shape[2])
    own = slice(sequence, sequence + 1)
    views = [MapView(q[own], k[own], scale, head, stop, MAX_CELLS) for head in heads]
    norm = common_norm(views)
    for number in range(num_groups * num_columns):
        group, column = divmod(number, num_columns)
        if number >= len(heads):
            for row in range(num_rows // num_groups):
                panels[group * (2 if is_pair else 1) + row, column].set_axis_off()
            continue
        head, view = heads[number], views[number]
        after = one_head(plan, sequence, head)
        before = None if plan_before is None else one_head(plan_before, sequence, head)
        if is_pair:
            _draw_pair(panels[2 * group : 2 * group + 2, column], view, before, after, norm)
        else:
            draw_panel(panels[group, column], view, None, after, norm=norm)
            panels[group, column].set_title(_heading(view, after, ""), fontsize=11)
    for axes in panels[:, 0]:
        axes.set_ylabel("query position", fontsize=10)
    for axes in panels.ravel():
        axes.tick_params(labelsize=8)
    bar = figure.colorbar(ScalarMappable(norm, MAP_COLOURS), ax=panels, shrink=0.6, extend="both")
    bar.set_label("attention probability, largest in each cell", fontsize=10)
    _finish(figure, title, stop, k.shape[2])
    return save(figure, path)


def _draw_pair(
    panels: np.ndarray,
    view: MapView,
    before: AttentionPlan | None,
    after: AttentionPlan,
    norm: LogNorm,
) -> None:
    """One head above in natural order, below in plan order."""
    draw_panel(panels[0], view, None, before, norm=norm)
    draw_panel(panels[1], view, after, after, norm=norm)
    panels[0].set_title(_heading(view, before, "before"), fontsize=11)
    panels[1].set_title(_heading(view, after, "after"), fontsize=11)
    panels[1].set_xlabel("key place in plan order", fontsize=10)


def _heading(view: MapView, plan: AttentionPlan | None, when: str) -> str:
    name = f"head {view.head}{', ' if when else ''}{when}"
    if plan is None:
        return name
    density, coverage = shares_of(view, plan)
    return f"{name}\n{density:.1%} of tiles, {coverage:.1%} of attention"


def _finish(figure: Figure, title: str, stop: int, num_keys: int) -> None:
    part = f"first {stop:,} of " if stop < num_keys else ""
    width = round(11 * figure.get_figwidth())
    figure.suptitle(textwrap.fill(f"{title} ({part}{num_keys:,} tokens)", width), fontsize=13)
    columns = 3 if figure.get_figwidth() > 9 else 2
    figure.legend(handles=map_legend(), loc="outside lower center", ncols=columns, fontsize=10)

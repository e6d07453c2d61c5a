"""Attention maps of one head before and after the permutation, with the computed tiles."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from experiments.report.pictures.looks import new_figure, save
from experiments.report.pictures.map_panels import (
    MapView,
    check_maps,
    draw_panel,
    map_legend,
    moves_tokens,
    one_head,
    shares_of,
)
from pbs.ops.plan import AttentionPlan


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
    check_maps(q, k, heads=[head], sequence=sequence, max_tokens=max_tokens, before=plan_before)
    num_keys = k.shape[2]
    stop = num_keys if max_tokens is None else min(max_tokens, num_keys)
    view = MapView(q[sequence : sequence + 1], k[sequence : sequence + 1], scale, head, stop)
    after = one_head(plan, sequence, head)
    before = None if plan_before is None else one_head(plan_before, sequence, head)

    figure = new_figure(13.0, 7.0)
    panels = figure.subplots(1, 2)
    part = f"first {stop:,} of " if stop < num_keys else ""
    figure.suptitle(f"{title} ({part}{num_keys:,} tokens)", fontsize=14)
    if not moves_tokens(plan):
        headings = ("Keys in natural order", "The same keys: this plan moves none")
        place = "key position (tokens)"
    else:
        headings = ("Before: keys in natural order", "After: keys in plan order")
        place = "key place in plan order (tokens)"
    image = draw_panel(panels[0], view, None, before)
    draw_panel(panels[1], view, after, after, norm=image.norm)
    for axes, own, heading in zip(panels, (before, after), headings, strict=True):
        axes.set_title(heading if own is None else f"{heading}\n{_shares(view, own)}", fontsize=12)
    panels[0].set_xlabel("key position (tokens)", fontsize=11)
    panels[1].set_xlabel(place, fontsize=11)
    panels[0].set_ylabel("query position (tokens)", fontsize=11)
    bar = figure.colorbar(image, ax=list(panels), shrink=0.85, pad=0.01, extend="both")
    label = "attention probability, largest in each cell"
    bar.set_label(f"{label} of {view.cell} x {view.cell} tokens" if view.cell > 1 else label)
    figure.legend(handles=map_legend(), loc="outside lower center", ncols=4, fontsize=11)
    return save(figure, path)


def _shares(view: MapView, plan: AttentionPlan) -> str:
    density, coverage = shares_of(view, plan)
    share = "computed" if view.is_whole else "whole head"
    return f"{share}: {density:.1%} of causal tiles, {coverage:.1%} of attention"

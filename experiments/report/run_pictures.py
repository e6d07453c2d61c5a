"""The pictures that a run, and the runs of one group, end with: benches measure, this draws.

A bench without a line here has none of its own; tables and the pictures of
:mod:`experiments.report.pictures` that go by metrics show it all the same.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.benches.base import Bench, Context

if TYPE_CHECKING:
    from experiments.benches.coverage.bench import CoverageBench
    from experiments.benches.needle import NeedleBench

# Prompt length of the attention map: long enough for the structure, short enough to see tiles.
MAP_LENGTH = 2048

logger = logging.getLogger(__name__)


def draw_run(bench: Bench, context: Context) -> list[Path]:
    """The pictures of one run, in its folder."""
    draw = OF_A_RUN.get(context.cfg.bench["name"])
    return draw(bench, context) if draw else []


def draw_together(bench: str, folders: Sequence[Path], folder: Path) -> list[Path]:
    """Pictures over several finished runs on the same samples, in the folder of their group."""
    draw = OF_A_GROUP.get(bench)
    return draw(folders, folder) if draw else []


def needle_map(bench: NeedleBench, context: Context) -> list[Path]:
    """One head's attention before and after the permutation, with the computed tiles."""
    import torch

    from experiments.benches.needle import num_layers
    from experiments.benches.needle_tasks import encode, make_sample
    from experiments.report.pictures import capture_call, choose_head, draw_attention_maps

    model = context.model
    sample = make_sample(
        bench.tasks[0],
        length=min(MAP_LENGTH, model.max_length),
        depth=0.5,
        index=0,
        seed=context.cfg.seed,
        tokenizer=model.tokenizer,
    )
    ids = torch.tensor([encode(sample, model.tokenizer)])
    layer = num_layers(model) - 1
    call = capture_call(model.model, ids, context.method, layer=layer)
    if call.plan.is_dense:
        return []
    before = None
    if getattr(context.method, "order", "none") != "none":
        unordered = dataclasses.replace(context.method, order="none")
        before = unordered.plan(call.q, call.k, scale=call.scale, layer_idx=layer)
    head = choose_head(call, before)
    path = context.folder / "attention_map.png"
    title = f"{context.cfg.method['name']} on {context.cfg.model_name}, layer {layer}, head {head}"
    return [
        draw_attention_maps(
            call.q,
            call.k,
            call.plan,
            scale=call.scale,
            head=head,
            path=path,
            title=title,
            plan_before=before,
        )
    ]


def coverage_pictures(bench: CoverageBench, context: Context) -> list[Path]:
    """Curves, heads and attention maps of this run, and ``heads.csv``."""
    from experiments.report.galleries import (
        MAX_CHOSEN,
        NUM_LAYERS,
        NUM_TOKENS,
        draw_galleries,
        spread,
    )
    from experiments.report.pictures.paper import draw_run

    records = context.records()
    measured = sorted({record["layer"] for record in records})
    num_layers = NUM_LAYERS if bench.layers is None else MAX_CHOSEN
    return [
        *draw_run(context.folder),
        *draw_galleries(
            context.cfg,
            context.model,
            context.folder,
            layers=spread(measured, num_layers),
            heads=None if bench.heads is None else spread(bench.heads, MAX_CHOSEN),
            num_tokens=min(NUM_TOKENS, max(bench.lengths)),
        ),
    ]


def speed_up(_bench: Bench, context: Context) -> list[Path]:
    """Speed-up against length; the table goes to the log and to ``times.csv``."""
    from experiments.report.pictures.looks import save
    from experiments.report.time_figures import draw_speed_up
    from experiments.report.times import Times, break_even_table, timing_table
    from experiments.settings.environment import device_name
    from experiments.timing.timing_report import write_times

    records = context.records()
    write_times(records, context.folder / "times.csv")
    cfg = context.cfg
    title = f"{cfg.bench['name']} on {cfg.model_name}"
    times = Times(title, device_name(), tuple(records))
    for table in (timing_table(times), break_even_table(times)):
        logger.info("%s", table if isinstance(table, str) else table.to_string(index=False))
    figure = draw_speed_up(times)
    return [] if isinstance(figure, str) else [save(figure, context.folder / "speed_up.png")]


def coverage_curves(folders: Sequence[Path], folder: Path) -> list[Path]:
    """The curves of all runs."""
    from experiments.report.pictures.paper import draw_curves

    return draw_curves(folders, folder)


def likelihood_curves(folders: Sequence[Path], folder: Path) -> list[Path]:
    """KL against density and time."""
    from experiments.report.pictures.likelihood_curves import draw_likelihood

    return draw_likelihood(folders, folder)


OF_A_RUN: dict[str, Callable[[Any, Context], list[Path]]] = {
    "needle": needle_map,
    "coverage": coverage_pictures,
    "attention": speed_up,
    "ttft": speed_up,
}
OF_A_GROUP: dict[str, Callable[[Sequence[Path], Path], list[Path]]] = {
    "coverage": coverage_curves,
    "likelihood": likelihood_curves,
}

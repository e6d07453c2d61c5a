"""Galleries of a run's attention maps, before and after the permutation.

Every run of ``bench=coverage`` ends with them for a few layers and heads. Queries and keys are
those of the model under dense attention, the same before and after.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.settings.config import RunConfig, parameters

if TYPE_CHECKING:
    from experiments.models.load import LoadedModel

# Long enough for the structure, short enough to see tiles.
NUM_TOKENS = 2048
NUM_LAYERS = 3
NUM_HEADS = 4
# Of the layers, and of the heads, that a user chose for a bench.
MAX_CHOSEN = 8


def draw_galleries(
    cfg: RunConfig,
    model: LoadedModel,
    folder: Path,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    num_tokens: int = NUM_TOKENS,
) -> list[Path]:
    """One picture per layer, ``attention_maps_layer<number>.png``.

    Args:
        cfg: of the run: its method, and its text if the bench is coverage (else a needle prompt).
        model: the run's model, not patched.
        folder: where the pictures go.
        layers: default: up to ``NUM_LAYERS``, evenly spread.
        heads: query heads; default: ``NUM_HEADS`` from the one that the permutation saves most
            tiles to the one that it saves least, evenly spread.
        num_tokens: of the prompt.

    Returns:
        The pictures; none of a layer in which the method computes everything.

    Raises:
        ValueError: a layer or a head that does not exist.
    """
    from experiments.benches.coverage.texts import make_prompts
    from experiments.benches.needle import num_layers
    from experiments.benches.text_files import NEEDLE
    from experiments.report.pictures.capture import capture_calls, choose_heads
    from experiments.report.pictures.map_gallery import draw_map_gallery
    from pbs.methods import build_method

    text = cfg.bench.get("text", NEEDLE) if cfg.bench["name"] == "coverage" else NEEDLE
    length = min(num_tokens, model.max_length)
    (prompt,) = make_prompts(text, model, lengths=[length], num_prompts=1, seed=cfg.seed)
    if layers is None:
        layers = spread(range(num_layers(model)), NUM_LAYERS)
    method = build_method(cfg.method["name"], **parameters(cfg.method))
    name = f"{cfg.method['name']} on {cfg.model_name}"
    pictures = []
    for call in capture_calls(model.model, prompt.ids, build_method("flash"), layers=layers):
        settings = {"scale": call.scale, "layer_idx": call.layer_idx}
        plan = method.plan(call.q, call.k, **settings)
        if plan.is_dense:
            continue
        before = None
        if getattr(method, "order", "none") != "none":
            unordered = dataclasses.replace(method, order="none")
            before = unordered.plan(call.q, call.k, **settings)
        chosen, why = heads, ""
        if chosen is None:
            chosen = choose_heads(plan, before, NUM_HEADS)
            why = ", densest heads first" if before is None else ", most tiles saved first"
        pictures.append(
            draw_map_gallery(
                call.q,
                call.k,
                plan,
                scale=call.scale,
                heads=chosen,
                path=folder / f"attention_maps_layer{call.layer_idx:02}.png",
                title=f"{name}, layer {call.layer_idx}{why}: {prompt.name}",
                plan_before=before,
            )
        )
    return pictures


def spread(numbers: Sequence[int], count: int) -> list[int]:
    """``count`` of these numbers, evenly spread, both ends among them; all if there are fewer."""
    if len(numbers) <= count:
        return list(numbers)
    return [numbers[round(index * (len(numbers) - 1) / (count - 1))] for index in range(count)]

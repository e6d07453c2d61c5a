"""What follows from the times of a prefill: speed-ups, and the cost model's floors.

Importable without hydra and wandb.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from experiments.memory import device_bytes
from experiments.settings.ranks import num_ranks
from experiments.timing.cost_model import Rates, floor_ms
from experiments.timing.counted_methods import counted_settings, least_density
from experiments.timing.length_plan import lack_of_memory
from experiments.timing.model_cost import Architecture, model_memory, prefill_cost
from experiments.timing.samples import add_speed_ups
from pbs.methods import AttentionMethod

Record = dict[str, Any]


def architecture_of(model: PreTrainedModel) -> Architecture | None:
    """What this process has of a model, for counting; None for layers that are not counted."""
    size = next(model.parameters()).element_size()
    whole = Architecture.of(model.config.get_text_config(), element_size=size)
    return None if whole is None else whole.share(num_ranks())


def cannot_fit(
    model: PreTrainedModel, num_tokens: int, method: AttentionMethod | None
) -> str | None:
    """Why a prefill cannot fit where the model lies; None if it may, or if that is not known."""
    architecture = architecture_of(model)
    settings = {"method": "flash"} if method is None else counted_settings(method)
    if architecture is None or settings is None:
        return None
    needed = model_memory(
        architecture,
        num_tokens,
        method=settings["method"],
        density=1.0 if method is None else least_density(method),
        shared_order=settings.get("shared_order", False),
    )
    if model.device.type == "cpu":  # what is free on a host is free beside the weights
        del needed["weights"]
    return lack_of_memory(needed, device_bytes(model.device))


def add_prefill_ratios(
    record: Record,
    methods: Mapping[str, AttentionMethod],
    architecture: Architecture | None,
    rates: Rates | None,
) -> None:
    """Add speed-ups over each dense kernel, and floors where rates and architecture are known."""
    add_speed_ups(record)
    known = {name: e for name, e in record["dense"].items() if e["median_ms"] is not None}
    can_count = rates is not None and architecture is not None
    for entry in known.values() if can_count else ():
        work = prefill_cost(architecture, record["length"])
        entry["floor_ms"] = floor_ms(work, rates)
    for label, entry in record["methods"].items():
        if entry["median_ms"] is None:
            continue
        # So that both levels have the same columns.
        entry["dense_reason"] = "" if entry["num_sparse_layers"] else "no layer ran sparse"
        ran_dense = not entry["num_sparse_layers"]
        settings = {"method": "flash"} if ran_dense else counted_settings(methods[label])
        # A mix of layers that ran sparse and dense is not counted.
        is_mixed = 0 < entry["num_sparse_layers"] < entry["num_layers"]
        if can_count and settings is not None and not is_mixed:
            density = 1.0 if ran_dense else entry["density"]
            work = prefill_cost(architecture, record["length"], density=density, **settings)
            entry["floor_ms"] = floor_ms(work, rates)
            entry["stage_floors_ms"] = {name: one.floor_ms(rates) for name, one in work.items()}

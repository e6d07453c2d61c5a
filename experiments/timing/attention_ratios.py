"""What follows from the times of a cell: TFLOP/s, speed-ups, shares, and the cost model's floors.

Importable without hydra and wandb.
"""

from __future__ import annotations

from collections.abc import Mapping

from experiments.timing.cost_model import Rates, Work, dense_flops, floor_ms, method_cost
from experiments.timing.counted_methods import counted_settings
from experiments.timing.inputs import Cell, Record
from experiments.timing.samples import add_speed_ups
from pbs.methods.base import AttentionMethod


def add_ratios(
    record: Record, cell: Cell, methods: Mapping[str, AttentionMethod], rates: Rates | None
) -> None:
    """What follows from times and counts: TFLOP/s, speed-ups, shares, floors."""
    flops = dense_flops(cell.shape, cell.length)
    add_speed_ups(record)
    fastest = record["fastest_dense"]
    known = {name: e for name, e in record["dense"].items() if e["median_ms"] is not None}
    for entry in known.values():
        entry["tflops"] = flops / entry["median_ms"] / 1e9
        if rates is not None:
            work = method_cost("flash", cell.shape, cell.length)
            entry["floor_ms"] = floor_ms(work, rates)
    record["input_bytes"] = cell.shape.input_bytes(cell.length)
    for label, entry in record["methods"].items():
        if entry["median_ms"] is None:
            continue
        if entry.get("peak_bytes") is not None:
            entry["peak_over_inputs"] = entry["peak_bytes"] / record["input_bytes"]
        if "stages_ms" in entry and entry["stages_ms"]["attention"] > 0:
            tflops = entry["density"] * flops / entry["stages_ms"]["attention"] / 1e9
            entry["attention_tflops"] = tflops
            if fastest:
                entry["share_of_dense_tflops"] = tflops / known[fastest]["tflops"]
            overhead = sum(entry["stages_ms"].values()) - entry["stages_ms"]["attention"]
            entry["overhead_share"] = overhead / sum(entry["stages_ms"].values())
        work = _cost_of(methods[label], cell, entry)
        if rates is not None and work is not None:
            entry["floor_ms"] = floor_ms(work, rates)
            entry["stage_floors_ms"] = {name: w.floor_ms(rates) for name, w in work.items()}


def _cost_of(method: AttentionMethod, cell: Cell, entry: Record) -> Mapping[str, Work] | None:
    """The cost model's stages of a method; None without a count."""
    if entry["dense_reason"]:
        return method_cost("flash", cell.shape, cell.length)
    settings = counted_settings(method)
    if settings is None:
        return None
    return method_cost(
        shape=cell.shape, num_tokens=cell.length, density=entry["density"], **settings
    )

"""What a run's time is compared with: the fastest dense run of the same device and environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.machine_load import mean_load
from experiments.pairing import pair_records
from experiments.report.compare import dense_runs, samples_of
from experiments.run_environments import AGAIN, differing_parts, environments_in, environments_of
from experiments.settings.config import RunConfig
from experiments.settings.names import describe
from experiments.store import Record, RunStore
from experiments.time_ratios import compare_paired_times

TIME = "prefill_seconds"


def compare_times(cfg: RunConfig, store: RunStore, length: int | None) -> dict[str, Any]:
    """The speed-up of a run over the fastest dense run, or why there is none.

    Of all finished dense runs (method ``flash``, whatever its kernel) of the same model, bench and
    seed (:func:`experiments.report.compare.sample_family`), those count that timed every one of
    these samples, with equal inputs, on the same device in the same environment: packages, threads
    and the project's own source are equal. The fastest has the smallest median on these samples.

    Args:
        cfg: of the run.
        store: of the run, finished.
        length: the times of which length, in tokens; None for all samples.

    Returns:
        ``speed_up`` with its interval (:func:`experiments.time_ratios.compare_paired_times`),
        ``speed_up_over`` (the dense run's label), ``speed_up_hash``, and how busy others kept the
        machine, ``load`` and ``dense_load``; or ``no_speed_up`` (a sentence); nothing for a run
        without times, or where no dense run is.
    """
    from experiments.statistics import quantiles

    timed = [record for record in samples_of(store) if _is_timed(record, length)]
    if not timed:
        return {}
    ours = _environments(store, timed)
    if len(ours) > 1:
        return {"no_speed_up": f"its samples were timed in {len(ours)} environments; {AGAIN}"}
    found, reasons = [], []
    for dense, dense_cfg in dense_runs(cfg):
        label = f"{describe(dense_cfg.method)} ({dense.folder.name})"
        partners = pair_records(timed, samples_of(dense)).theirs
        if len(partners) < len(timed) or not all(_is_timed(one, None) for one in partners):
            reasons.append(f"{label} timed {len(partners)} of the {len(timed)} samples")
            continue
        theirs = _environments(dense, partners)
        if theirs.keys() != ours.keys():
            reasons.append(f"{label} {_difference(ours, theirs)}")
            continue
        seconds = quantiles([partner[TIME] for partner in partners]).median
        found.append((seconds, dense.folder.name, describe(dense_cfg.method), partners))
    if not found:
        return {"no_speed_up": "; ".join(reasons)} if reasons else {}
    _, digest, label, partners = min(found, key=lambda entry: entry[:2])
    if digest == store.folder.name:
        return {"speed_up": 1.0, "speed_up_over": label, "speed_up_hash": digest}
    paired = compare_paired_times(*([one[TIME] for one in side] for side in (partners, timed)))
    return {
        **paired,
        "speed_up_over": label,
        "speed_up_hash": digest,
        "load": mean_load(timed),
        "dense_load": mean_load(partners),
    }


def _is_timed(record: Record, length: int | None) -> bool:
    is_asked = length is None or record.get("length") == length
    return is_asked and record.get(TIME) is not None


def _environments(store: RunStore, records: Sequence[Record]) -> dict[str, Any]:
    """The environments of these samples by their ids; of older runs, all that env.json has."""
    known = store.environments()
    stated = environments_of(records)
    if "unnamed" not in stated:
        return {name: known.get(name, {}) for name in stated}
    named = {name: known.get(name, {}) for name in stated if name != "unnamed"}
    rest = {name: env for name, env in known.items() if name not in named}
    device = {"device": store.metrics().get("device")}  # all that is known without env.json
    return {**named, **(rest or environments_in(device))}


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    if len(theirs) > 1:
        return f"was timed in {len(theirs)} environments"
    (mine,), (other,) = ours.values(), theirs.values()
    if mine.get("device") != other.get("device"):
        return f"was timed on another device, {other.get('device')}"
    parts = ", ".join(differing_parts(mine, other))
    return f"was timed in another environment ({parts} differ)"

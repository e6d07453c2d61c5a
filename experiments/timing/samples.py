"""What timed calls say: which are cold, their median and percentiles, and ratios between variants.

Plain Python: records as of :func:`experiments.timing.attention_timing.measure_cell`, measured now
or read from a file. Importable without hydra, torch and wandb.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.statistics import FEWEST_FOR_PERCENTILES, quantiles

Record = dict[str, Any]

# Calls of one variant are warm from the first one on that differs from the one before it by at most
# this share of the faster of the two.
TOLERANCE = 0.2
# A median of fewer samples is marked wherever it stands.
FEW_SAMPLES = FEWEST_FOR_PERCENTILES
COLD = "cold"


def agree(one: float, other: float) -> bool:
    """Whether two calls in a row took the same time, as far as warm-up is concerned."""
    return abs(one - other) <= TOLERANCE * min(one, other)


def num_cold(samples: Sequence[float], *, earlier: float | None = None) -> int:
    """How many samples to leave out: those before the first of two in a row that agree.

    Args:
        samples: of one variant, in the order they were made.
        earlier: a call of the same variant before them, if there was one; the first sample that
            agrees with it is warm.

    Returns:
        All of them if no two in a row agree: then none is known to be warm.
    """
    if samples and earlier is not None and agree(earlier, samples[0]):
        return 0
    for index in range(len(samples) - 1):
        if agree(samples[index], samples[index + 1]):
            return index
    return len(samples)


def summarise(samples: Sequence[float], waits: Sequence[float] = ()) -> Record:
    """Medians and 20th and 80th percentiles, with their counts.

    Args:
        samples: milliseconds of the device, one per call.
        waits: milliseconds that a caller waited, one per call; empty where that was not measured.
    """
    device = quantiles(samples)
    found: Record = {
        "median_ms": device.median,
        "p20_ms": device.p20,
        "p80_ms": device.p80,
        "num_samples": len(samples),
        "samples_ms": list(samples),
    }
    if waits:
        wall = quantiles(waits)
        found |= {
            "wall_ms": wall.median,
            "wall_p20_ms": wall.p20,
            "wall_p80_ms": wall.p80,
            "num_wall_samples": len(waits),
            "wall_samples_ms": list(waits),
        }
    return found


def without_cold_samples(record: Record) -> Record:
    """A record as it is when cold samples are left out by rule, all that follows from them anew.

    For records whose calls were not warmed up until they agreed (those without "dropped_ms");
    others come back with their ratios computed again. A variant none of whose samples is known to
    be warm has no time: its failure is "cold".
    """
    record = dict(record)
    for kind in ("dense", "methods"):
        record[kind] = {name: _warm(entry) for name, entry in record[kind].items()}
    if record["dense"] or record["methods"]:
        add_speed_ups(record)
    return record


def _warm(entry: Mapping[str, Any]) -> Record:
    samples = list(entry.get("samples_ms", ()))
    if entry.get("median_ms") is None or not samples:
        return dict(entry)
    # How long the host launched was in the clock of calls that still compiled: of no use.
    kept = {key: value for key, value in entry.items() if key != "host_ms"}
    if "dropped_ms" in entry:
        return kept
    count = num_cold(samples, earlier=entry.get("first_ms"))
    if count == len(samples):
        texts = ", ".join(f"{sample:.4g}" for sample in samples)
        gone = {"samples_ms", "p20_ms", "p80_ms", *_RATIOS}
        return {
            **{key: value for key, value in kept.items() if key not in gone},
            "median_ms": None,
            "failure": COLD,
            "message": f"no two calls in a row agree within {TOLERANCE:.0%} ({texts} ms)",
            "dropped_ms": samples,
        }
    return kept | summarise(samples[count:]) | {"dropped_ms": samples[:count]}


# What :func:`add_speed_ups` gives a method.
_RATIOS = (
    *("speed_up", "speed_up_p20", "speed_up_p80"),
    *("speed_up_over_fastest", "speed_up_over_fastest_p20", "speed_up_over_fastest_p80"),
    *("wall_speed_up", "wall_speed_up_over_fastest"),
)


def add_speed_ups(record: Record) -> None:
    """Add every method's speed-up over each dense kernel and the fastest; ratios of medians.

    20th and 80th percentiles are those of the ratios round by round, in which variants take turns.
    ``wall_speed_up`` is the same ratio of what a caller waits, over the fastest by that measure.
    """
    dense = {name: e for name, e in record["dense"].items() if e.get("median_ms") is not None}
    fastest = min(dense, key=lambda name: dense[name]["median_ms"]) if dense else None
    record["fastest_dense"] = fastest
    for name, entry in dense.items():
        entry["is_fastest"] = name == fastest
    waits = {name: e["wall_ms"] for name, e in dense.items() if e.get("wall_ms") is not None}
    for entry in record["methods"].values():
        if entry.get("median_ms") is None:
            continue
        over = {name: one["median_ms"] / entry["median_ms"] for name, one in dense.items()}
        spread = {name: _paired(one, entry) for name, one in dense.items()}
        low, high = ({n: pair[end] for n, pair in spread.items()} for end in (0, 1))
        entry |= {"speed_up": over, "speed_up_p20": low, "speed_up_p80": high}
        entry["speed_up_over_fastest"] = over.get(fastest) if fastest else None
        for name, values in (("p20", low), ("p80", high)):
            entry[f"speed_up_over_fastest_{name}"] = values.get(fastest) if fastest else None
        if entry.get("wall_ms") is not None and waits:
            entry["wall_speed_up"] = {name: ms / entry["wall_ms"] for name, ms in waits.items()}
            entry["wall_speed_up_over_fastest"] = min(waits.values()) / entry["wall_ms"]


def _paired(dense: Mapping[str, Any], ours: Mapping[str, Any]) -> tuple[float | None, ...]:
    """20th and 80th percentile of the ratios of the rounds that both have, the last ones."""
    theirs, own = dense.get("samples_ms", ()), ours.get("samples_ms", ())
    count = min(len(theirs), len(own))
    if not count:
        return None, None
    pairs = zip(theirs[-count:], own[-count:], strict=True)
    found = quantiles([slow / fast for slow, fast in pairs])
    return found.p20, found.p80

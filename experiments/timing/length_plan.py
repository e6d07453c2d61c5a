"""Which lengths can be measured where: what they need at least, beside what there is.

Plain Python. Benches ask before they try, since a host that runs out of memory kills the process.

    python -m experiments.timing.length_plan --memory 80 [--shape 32/8/128] [--density 0.22]
    python -m experiments.timing.length_plan --memory 80 --model CONFIG_FOLDER
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from experiments.timing.cost_model import (
    H100,
    H200,
    Rates,
    Shape,
    attention_memory,
    floor_ms,
    method_cost,
)
from experiments.timing.model_cost import Architecture, model_memory, prefill_cost

GIB = 2.0**30
LENGTHS = (8192, 16384, 32768, 65536, 131072, 262144, 524288)
CHIPS = {"h100": H100, "h200": H200}


def lengths_that_fit(
    lengths: Iterable[int], memory: float, size: Callable[[int], Mapping[str, float]]
) -> list[int]:
    """The lengths whose tensors fit.

    Args:
        lengths: candidates.
        memory: bytes there are; leave some for the allocator, 0.9 of a GPU's memory is sound.
        size: bytes at a length, from ``attention_memory`` or ``model_memory``.
    """
    return [length for length in lengths if sum(size(length).values()) <= memory]


def lack_of_memory(needed: Mapping[str, float], available: float | None) -> str | None:
    """Why tensors cannot fit; None if they may.

    Args:
        needed: bytes by name, lower bounds.
        available: bytes there are; None if that is not known.
    """
    total = sum(needed.values())
    if available is None or total <= available:
        return None
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in needed.items() if size)
    return f"needs at least {total / GIB:.1f} GiB ({parts}), there are {available / GIB:.1f} GiB"


@dataclass(frozen=True)
class PlannedLength:
    """One method at one length.

    Attributes:
        length: N.
        method: as in the cost model.
        needed_bytes: at least, on each device.
        floor_ms: time below which no version gets; what devices send each other is not counted.
        num_devices: fewest that share the heads evenly and hold it; None: no number of them does,
            and the other numbers are for as many as there are heads.
    """

    length: int
    method: str
    needed_bytes: float
    floor_ms: float
    num_devices: int | None


def plan_prefill(
    architecture: Architecture,
    length: int,
    *,
    method: str,
    density: float,
    memory: float,
    rates: Rates,
) -> PlannedLength:
    """A prefill of a whole model, shared over as many devices as it takes.

    Args:
        architecture: of the whole model.
        length: N.
        method: as in the cost model.
        density: tiles computed / causal tiles.
        memory: bytes of one device.
        rates: of one device.
    """

    def needed(num_ranks: int) -> float:
        part = architecture.share(num_ranks)
        return sum(model_memory(part, length, method=method, density=density).values())

    counts = [n for n in range(1, architecture.shape.kv_heads + 1) if _divides(n, architecture)]
    enough = next((n for n in counts if needed(n) <= memory), None)
    chosen = enough or counts[-1]
    work = prefill_cost(architecture.share(chosen), length, method=method, density=density)
    return PlannedLength(length, method, needed(chosen), floor_ms(work, rates), enough)


def plan_attention(
    shape: Shape, length: int, *, method: str, density: float, memory: float, rates: Rates
) -> PlannedLength:
    """One attention call on one device; arguments as of :func:`plan_prefill`."""
    needed = sum(attention_memory(method, shape, length, density=density).values())
    work = method_cost(method, shape, length, density=density)
    fits = 1 if needed <= memory else None
    return PlannedLength(length, method, needed, floor_ms(work, rates), fits)


def _divides(num_ranks: int, architecture: Architecture) -> bool:
    sizes = (architecture.shape.kv_heads, architecture.intermediate_size)
    return all(size % num_ranks == 0 for size in sizes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line per length and method."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.timing.length_plan", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--memory", type=float, required=True, help="GiB of one device")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--methods", nargs="+", default=["flash", "pbs"])
    parser.add_argument("--density", type=float, default=0.22, help="of methods other than flash")
    parser.add_argument("--chip", choices=CHIPS, default="h100", help="whose rates make the floor")
    parser.add_argument("--shape", default="32/8/128", help="heads of one attention call")
    parser.add_argument("--model", type=Path, help="folder with a config.json: a whole prefill")
    options = parser.parse_args(arguments)
    architecture = None
    if options.model is not None:
        architecture = Architecture.of(read_config(options.model))
        if architecture is None:
            parser.error(f"--model {options.model}: not a decoder with gated feed-forward layers")
    _say(f"{'N':>7} {'method':12} {'GiB on each':>12} {'devices':>8} {'floor, ms':>10}")
    for length in options.lengths:
        for method in options.methods:
            settings = {
                "method": method,
                "density": 1.0 if method == "flash" else options.density,
                "memory": options.memory * GIB,
                "rates": CHIPS[options.chip],
            }
            if architecture is None:
                planned = plan_attention(Shape.parse(options.shape), length, **settings)
            else:
                planned = plan_prefill(architecture, length, **settings)
            devices = "too long" if planned.num_devices is None else planned.num_devices
            _say(
                f"{length:>7} {method:12} {planned.needed_bytes / GIB:12.1f} {devices:>8} "
                f"{planned.floor_ms:10.2f}"
            )
    return 0


def read_config(folder: Path) -> SimpleNamespace:
    """A model's config.json by attributes."""
    return SimpleNamespace(**json.loads((folder / "config.json").read_text()))


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - the report itself


if __name__ == "__main__":
    sys.exit(main())

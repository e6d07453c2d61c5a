"""``make bench`` and ``make bench-gpu``: a loop over ordinary benches, in ordinary run folders.

The gate (``bench=gate``), Table 7 of the paper and the selection cost of every method
(``bench=attention``), and the time to first token of Llama-3.1-8B with random weights
(``bench=ttft``), one run a length, as far as the time goes. Each run is what ``python run.py`` with
the same words makes: results are on disk after every cell, the same command continues, further
parts and lengths may be added to a folder by the same code on the same device.

    python -m experiments.tools.bench --on gpu --out DIR [--parts gate,table7,selection,ttft]
    python -m experiments.tools.bench --on gpu --out DIR --parts ttft --lengths 131072
    python -m experiments.tools.bench --on cpu      # minutes: the gate, attention beside SDPA
    python -m experiments.tools.bench --on smoke    # tiny, on a CPU: does it run?
    python -m experiments.timing.result_folders DIR # a CSV per part, for results to be committed
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from experiments.report.markdown import to_markdown
from experiments.report.times import break_even_table, committed_times, timing_table
from experiments.run_environments import differing_parts
from experiments.settings.config import CONF, ConfigError
from experiments.settings.environment import describe_environment
from experiments.settings.names import as_word
from experiments.store import RunStore
from experiments.timing.cost_model import Shape, dense_flops

PARTS = ("gate", "table7", "selection", "ttft")
# Shares of the time; what a part leaves goes to those after it.
SHARES = {"gate": 0.12, "table7": 0.22, "selection": 0.12, "ttft": 0.54}
# Calls of every variant at least: many up to a length, for whole models a shorter one, few above.
MANY_ROUNDS, FEW_ROUNDS, MOST_ROUNDS = 10, 5, 20
MANY_UP_TO = {"table7": 65536, "selection": 65536, "ttft": 32768}
# A round of all variants in dense calls at ``PREDICTED_FLOPS``, as measured on an H100. At the
# level of an op a round calls each of them twice, for the device's time and the wait, unless calls
# are long (``stopwatch.LONG_CALL_MS``).
CALLS_PER_ROUND = {"table7": 2.7, "selection": 6.4, "ttft": 2.7}
CALLED_TWICE_UP_TO = {"table7": 262144, "selection": 262144, "ttft": 0}
# Rounds' worth of calls before the first that counts: checks, compilers, warm-up.
ROUNDS_BEFORE = 2.5
# Assumed when predicting whether a cell still fits: dense FLOP/s of the slowest kernel.
PREDICTED_FLOPS = {"cuda": 350e12, "cpu": 2e10}
# Longest cells with structured inputs: above, drawing them on the host would take most of the time.
MAX_STRUCTURED = 131072
# A cell of the gate that compiles its kernels, as measured on an H100 and on a CPU.
SECONDS_OF_GATE = {"cuda": 7.0, "cpu": 0.2}
# Methods that the gate runs at every head shape.
GATED_WIDELY = ("pbs", "pbs shared")
# Layers, and parameters outside of attention, of Llama-3.1-8B.
NUM_LAYERS, NUM_PARAMETERS = 32, 8.03e9
# ``make bench``: PBS should be this much faster than SDPA on a CPU, at this length and density,
# and need less extra memory, its output included, than this many times q, k, v and the output.
TARGET_LENGTH, TARGET_DENSITY, TARGET_SPEED_UP, TARGET_MEMORY = 16384, 0.25, 2.0, 1.5

Method = Mapping[str, Any]
SHARED: Method = {"name": "pbs", "gqa": "shared"}


@dataclass(frozen=True)
class Sizes:
    """What one place measures.

    Attributes:
        shape: heads of one attention call.
        lengths: of each part; what everybody asks for first.
        gate_shapes: the first with every method, the others with PBS.
        gate_dtypes: as of ``bench.dtypes``.
        density: of "table7": "published", or a number.
        rounds: fewest and most; None: by part and length.
        methods: the settings that "selection" and the gate run methods at, by label; default every
            method of the registry that is ours at its own settings.
        model_words: overrides of the model of "ttft".
        parts: that are run by default.
    """

    shape: str = "32/8/128"
    lengths: Mapping[str, tuple[int, ...]] = field(
        default_factory=lambda: {
            "gate": (1000, 4096),
            "table7": (8192, 16384, 32768, 65536, 131072, 262144, 524288),
            "selection": (8192, 16384, 32768, 65536, 131072),
            "ttft": (131072, 8192, 16384, 32768, 65536, 262144),
        }
    )
    gate_shapes: tuple[str, ...] = ("8/2/128", "8/2/64", "8/2/96", "4/4/256")
    gate_dtypes: tuple[str, ...] = ("bfloat16", "float16")
    density: float | str = "published"
    rounds: tuple[int, int] | None = None
    methods: Mapping[str, Method] | None = None
    model_words: tuple[str, ...] = ()
    parts: tuple[str, ...] = PARTS


SMALL_METHODS: Mapping[str, Method] = {
    "pbs": {"name": "pbs"},
    "pbs shared": SHARED,
    "minference": {"name": "minference", "vertical_size": 64, "slash_size": 256},
    "streaming": {"name": "streaming", "n_init": 32, "n_local": 128},
}
SMALL_MODEL = (
    "model.config={num_hidden_layers: 2, hidden_size: 64, intermediate_size: 128, "
    "num_attention_heads: 2, num_key_value_heads: 1, head_dim: 32, vocab_size: 256}",
    "model.device=cpu",
    "model.dtype=float32",
)
SIZES = {
    "gpu": Sizes(),
    "cpu": Sizes(
        shape="4/4/64",
        lengths={"gate": (300, 600), "table7": (4096, 8192, TARGET_LENGTH)},
        gate_shapes=("4/2/32",),
        gate_dtypes=("float32",),
        density=TARGET_DENSITY,
        rounds=(5, 5),
        methods=SMALL_METHODS,
        parts=("gate", "table7"),
    ),
    "smoke": Sizes(
        shape="4/2/32",
        lengths={"gate": (300, 600), **dict.fromkeys(PARTS[1:], (512, 1024))},
        gate_shapes=("4/2/32",),
        gate_dtypes=("float32",),
        methods=SMALL_METHODS,
        model_words=SMALL_MODEL,
    ),
}


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        part: of ``PARTS``.
        words: what ``run.py`` would be told.
        seconds: that it takes at most, pessimistically.
    """

    part: str
    words: tuple[str, ...]
    seconds: float


def fewest_rounds(part: str, length: int) -> int:
    """Calls of every variant that a cell of this part has at least."""
    return MANY_ROUNDS if length <= MANY_UP_TO[part] else FEW_ROUNDS


def num_calls(part: str, length: int) -> float:
    """Dense calls' worth of work of a cell, for predicting its time."""
    times = 2 if length <= CALLED_TWICE_UP_TO[part] else 1
    return CALLS_PER_ROUND[part] * (times * fewest_rounds(part, length) + ROUNDS_BEFORE)


def own_methods() -> dict[str, Method]:
    """Every method of the registry that needs no other package, at its own settings, by label."""
    from pbs.methods import METHODS

    names = [name for name in METHODS if not name.endswith("_authors") and name != "flash"]
    found: dict[str, Method] = {name: {"name": name} for name in names}
    found["minference"] = {"name": "minference", "preset": "llama31-v2"}
    return {"pbs": found.pop("pbs"), "pbs shared": SHARED, **found}


def jobs(sizes: Sizes, part: str, device: str, lengths: Sequence[int] | None) -> Iterator[Job]:
    """The runs of a part, in the order of what is asked for first.

    Args:
        sizes: of this place.
        part: of ``PARTS``.
        device: "cuda" or "cpu".
        lengths: only these; the gate has its own.
    """
    methods = dict(sizes.methods or own_methods())
    if part == "gate":
        yield from _gate_jobs(sizes, methods, device)
        return
    for length in sizes.lengths[part]:
        if lengths is not None and length not in lengths:
            continue
        fewest, most = sizes.rounds or (fewest_rounds(part, length), MOST_ROUNDS)
        words = {"lengths": [length], "min_rounds": fewest, "max_rounds": most}
        words["seconds"] = {"table7": 4, "selection": 5, "ttft": 20}[part]
        flops = dense_flops(Shape.parse(sizes.shape), length)
        if part == "ttft":
            flops = NUM_LAYERS * flops + 2 * NUM_PARAMETERS * length if device == "cuda" else 0.0
            words |= {"densities": "published", "beside": {"pbs shared": SHARED}}
            model = ("model=llama31_8b", "model.weights=random", *sizes.model_words)
            found = (*model, *_bench_words("ttft", None, words))
        else:
            words |= {
                "shapes": [sizes.shape],
                "structure": "mixed" if length <= MAX_STRUCTURED else "random",
            }
            if part == "table7":
                is_published = sizes.density == "published"
                words["densities"] = sizes.density if is_published else [sizes.density]
                words |= {"coverage_rows": 0, "beside": {"pbs shared": SHARED}}
            else:
                beside = {label: one for label, one in methods.items() if label != "pbs"}
                words |= {"coverage_rows": 16, "beside": beside}
            found = _bench_words("attention", device, words)
        seconds = num_calls(part, length) * flops / PREDICTED_FLOPS[device] + 3.0 + length / 3e4
        yield Job(part, (*_method_words({"name": "pbs"}), *found), seconds)


def _gate_jobs(sizes: Sizes, methods: Mapping[str, Method], device: str) -> Iterator[Job]:
    """Every method at the first head shape, then PBS at the others, at the first length."""
    first, others, lengths = sizes.gate_shapes[:1], sizes.gate_shapes[1:], sizes.lengths["gate"]
    todo = [(method, first, lengths) for method in methods.values()]
    if others:
        todo += [(m, others, lengths[:1]) for label, m in methods.items() if label in GATED_WIDELY]
    known: set[str] = set()
    for method, shapes, some in todo:
        words = {"shapes": shapes, "lengths": some, "dtypes": sizes.gate_dtypes}
        count = len(shapes) * len(some) * len(sizes.gate_dtypes)
        # Kernels are compiled for the first method that meets a shape.
        each = SECONDS_OF_GATE[device] / (1 if shapes[0] not in known else 4)
        known |= {*shapes}
        bench = _bench_words("gate", device, words)
        yield Job("gate", (*_method_words(method), *bench), count * each)


def _method_words(method: Method) -> tuple[str, ...]:
    settings = [f"method.{key}={as_word(value)}" for key, value in method.items() if key != "name"]
    return (f"method={method['name']}", *settings)


def _bench_words(name: str, device: str | None, settings: Mapping[str, Any]) -> tuple[str, ...]:
    words = [f"bench.{key}={as_word(value)}" for key, value in settings.items()]
    if device is not None:
        words.append(f"bench.device={device}")
    return (f"bench={name}", *words)


def run_job(job: Job, out: Path, *, resumes: bool) -> Path:
    """Run it; returns its folder."""
    from hydra import compose, initialize_config_dir

    from experiments.run.cli import register_configs
    from experiments.run.runner import run_cell

    register_configs()
    words = [*job.words, f"paths.outputs={out}", "check=false", "logger.mode=disabled"]
    words += [] if resumes else ["resume=false"]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        composed = compose("config", overrides=words)
    return run_cell(composed, words)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1: a run failed, so that times mean nothing.

    2: the folder holds results of another environment.
    """
    options = _parse(arguments)
    logging.getLogger("experiments").setLevel(logging.WARNING)
    if options.resume and (problem := _other_environment(options.out)):
        _say(problem)
        return 2
    end = time.monotonic() + options.seconds
    left, failures, skipped = list(options.parts), [], []
    folders: dict[str, list[Path]] = {}
    while left:
        part = left.pop(0)
        share = SHARES[part] / sum(SHARES[name] for name in (part, *left))
        deadline = time.monotonic() + share * (end - time.monotonic())
        _say(f"\n== {part}, at most {max(0.0, deadline - time.monotonic()):.0f} s")
        for job in jobs(SIZES[options.on], part, options.device, options.lengths):
            started = time.monotonic()
            if started + job.seconds > deadline:
                skipped.append(f"{part}: no time for: python run.py {' '.join(job.words)}")
                continue
            folder = run_job(job, options.out, resumes=options.resume)
            folders.setdefault(part, []).append(folder)
            metrics = RunStore(folder).metrics()
            _say(
                f"{metrics['label']} {' '.join(job.words[-6:])}: {metrics['status']}, "
                f"{time.monotonic() - started:.1f} s"
            )
            if metrics["status"] != "finished":
                error = metrics["error"]
                failures.append(f"WRONG {part}: {error['message'][:500]} ({folder})")
    _say("\n== summary")
    for line in (*_summary(options.out, folders), *skipped, *failures):
        _say(line)
    if options.on == "cpu" and "table7" in folders:
        for line in target_lines(folders["table7"][-1]):
            _say(line)
    _say(f"results in {options.out}; `python -m experiments.report --outputs {options.out}`")
    return 1 if failures else 0


def _summary(out: Path, folders: Mapping[str, Sequence[Path]]) -> Iterator[str]:
    """The gate's worst cell of each method, and tables of times with break-even lengths."""
    for folder in folders.get("gate", ()):
        metrics = RunStore(folder).metrics()
        if "results" in metrics:
            total = metrics["results"]["total"]
            worst = total["error_share"]
            yield (
                f"gate {metrics['label']}: {total['num_samples']} cells, worst error / allowed "
                f"{'unknown' if worst is None else f'{worst:.2f}'}"
            )
    if {*folders} - {"gate"}:
        for times in committed_times(out):
            yield f"\n{times.title}, {times.device}"
            frame = timing_table(times)
            yield to_markdown({name: list(frame[name].astype(str)) for name in frame})
            points = break_even_table(times)
            if not isinstance(points, str):
                points = points[points["over dense"] == "fastest"]
                yield to_markdown({name: list(points[name].astype(str)) for name in points})


def target_lines(folder: Path) -> list[str]:
    """Whether PBS's speed and memory on a CPU are where they should be."""
    (record,) = RunStore(folder).samples()
    entry = record["methods"]["pbs"]
    if record["length"] != TARGET_LENGTH:
        return []
    if entry["median_ms"] is None:
        return [f"target not measured: {entry['failure']}: {entry['message']}"]
    speed_up, memory = entry["speed_up_over_fastest"], entry.get("peak_over_inputs")
    word = "met" if speed_up >= TARGET_SPEED_UP else "MISSED"
    lines = [
        f"target {word}: N={record['length']}, density {entry['density']:.3f}: {speed_up:.2f}x "
        f"SDPA [{entry['speed_up_over_fastest_p20']:.2f}, "
        f"{entry['speed_up_over_fastest_p80']:.2f}], {entry['num_samples']} calls, order and "
        f"selection included (at least {TARGET_SPEED_UP}x)"
    ]
    if memory is not None:
        word = "met" if memory < TARGET_MEMORY else "MISSED"
        lines.append(
            f"target {word}: peak extra memory {memory:.2f}x of q, k, v and output, output "
            f"included (below {TARGET_MEMORY}x)"
        )
    return lines


def _other_environment(out: Path) -> str | None:
    """Why this folder's results and new ones must not stand side by side; None if they may."""
    for path in sorted(out.glob("*/*/*/*/env.json")):
        was, now = json.loads(path.read_text(encoding="utf-8")), describe_environment()
        differing = differing_parts(was, now)
        if was.get("commit") != now["commit"]:
            differing = [*differing, "commit"]
        if differing:
            return (
                f"{path} was measured in another environment: {', '.join(differing)} differ (there "
                f"{was.get('device')}, commit {was.get('commit')}; here {now['device']}, commit "
                f"{now['commit']}); give another --out, or --again to measure anew"
            )
    return None


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.tools.bench", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--on", choices=SIZES, required=True, help="which sizes")
    parser.add_argument("--out", type=Path, help="folder of the runs; default outputs/bench_ON")
    parser.add_argument("--parts", help=f"which of {','.join(PARTS)}, in their order")
    parser.add_argument("--lengths", help="only these of the parts' lengths; the gate has its own")
    parser.add_argument("--seconds", type=float, default=1200.0, help="all parts together")
    parser.add_argument("--again", dest="resume", action="store_false", help="measure anew")
    options = parser.parse_args(arguments)
    options.out = options.out or Path("outputs") / f"bench_{options.on}"
    sizes = SIZES[options.on]
    options.parts = options.parts.split(",") if options.parts else list(sizes.parts)
    for part in options.parts:
        if part not in sizes.parts:
            parser.error(f"unknown part {part!r}; valid: {', '.join(sizes.parts)}")
    options.lengths = options.lengths and [int(n) for n in options.lengths.split(",")]
    options.device = "cuda" if options.on == "gpu" else "cpu"
    if options.on == "gpu" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --on smoke tries the command without one")
    return options


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - the report itself


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as error:
        sys.exit(str(error))

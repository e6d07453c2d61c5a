"""The needle bench on the embedded model, small: what ``needle.json`` records of every method.

Two groups of settings: every file of ``conf/method`` as it is, with the defaults of its class, and
every case of ``tests/methods/cases.py``, whose small tiles run sparse at this length.
"""

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from experiments.benches.base import Context
from experiments.benches.needle import NeedleBench
from experiments.models.load import LoadedModel, load_model
from experiments.run.cli import register_configs
from experiments.settings.config import CONF, RunConfig, parameters
from pbs import AttentionMethod, build_method
from tests.methods.cases import CASES, build

PATH = Path(__file__).with_name("needle.json")
DIGITS = 4
# Half a unit of the last digit is the file's rounding, the other half is for machines. Sums in
# another order move a mean of coverage by 1e-7; more only if a block that is as good as another
# changes places with it, and prompts on which that happens easily are refused by ``update``.
TOLERANCE = 10.0**-DIGITS
SEED = 0
BENCH = {
    "tasks": ["single", "multi_key", "variable_tracking", "copy"],
    "lengths": [1024],
    "depths": [0.3],
    "coverage_every": 1,
    "coverage_rows": 64,
}
QUANTITIES = ("score", "density", "coverage")

Numbers = dict[str, dict[str, float]]


def settings() -> Iterator[tuple[str, RunConfig, AttentionMethod]]:
    """Name, configuration and method of every setting, sorted by name in each group.

    The cases, which have no file, run under the last configuration: only their method differs.
    """
    register_configs()
    for path in sorted((CONF / "method").glob("*.yaml")):
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            words = [f"method={path.stem}", f"seed={SEED}", "logger.mode=disabled"]
            cfg = RunConfig.from_hydra(compose("config", overrides=words))
        method = build_method(cfg.method["name"], **parameters(cfg.method))
        yield f"conf/method/{path.name}", cfg, method
    for case in sorted(CASES):
        yield f"case {case}", cfg, build(case)


def measure(noise: float = 0.0, noise_seed: int = 0) -> Numbers:
    """Score, density and coverage of every setting, not rounded.

    Args:
        noise: relative change of every weight of the model, to see which numbers hang on rounding.
        noise_seed: of that change.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    numbers, model = {}, None
    try:
        for name, cfg, method in settings():
            model = model or _with_noise(load_model(cfg.model), noise, noise_seed)
            numbers[name] = _run(cfg, method, model)
    finally:
        torch.set_num_threads(threads)
    return numbers


def read() -> Numbers:
    """What the file records."""
    return json.loads(PATH.read_text())


def write(numbers: Numbers) -> None:
    """Write the file: a line per setting."""
    lines = [
        f"  {json.dumps(name)}: {json.dumps({key: round(row[key], DIGITS) for key in QUANTITIES})}"
        for name, row in numbers.items()
    ]
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def differences(old: Numbers, new: Numbers) -> list[str]:
    """A line for each number that moved, and each setting that only one of them has."""
    lines = []
    for name in sorted({*old, *new}):
        if name not in new or name not in old:
            lines.append(f"{name}: only in the {'file' if name in old else 'code'}")
            continue
        for key in QUANTITIES:
            was, now = old[name][key], new[name][key]
            if not abs(now - was) <= TOLERANCE:
                lines.append(f"{name}: {key} was {was:.{DIGITS}f}, is {now:.{DIGITS}f}")
    return lines


def _run(cfg: RunConfig, method: AttentionMethod, model: LoadedModel) -> dict[str, float]:
    """One setting's numbers, by way of the bench and its own summary."""
    bench, records = NeedleBench(**BENCH), []
    context = Context(
        cfg=cfg,
        method=method,
        model=model,
        folder=Path(),
        done=frozenset(),
        announce=lambda _: None,
        add=records.append,
    )
    bench.run(context)
    total: dict[str, Any] = bench.summarise(records)["total"]
    return {
        "score": total["accuracy"],
        "density": total["density"],
        "coverage": total["coverage"],
    }


def _with_noise(loaded: LoadedModel, noise: float, seed: int) -> LoadedModel:
    """The model, or a copy whose weights differ a little."""
    if not noise:
        return loaded
    model = copy.deepcopy(loaded.model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 1 + noise * torch.randn(weight.shape, generator=generator)
    return dataclasses.replace(loaded, model=model)

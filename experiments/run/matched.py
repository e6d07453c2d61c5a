"""Comparisons at equal density or coverage: finds the value of a method's own knob by bisection.

The knob is set on held-out prompts, and the method is then measured on the bench's own. Everything
tried is kept beside the runs, ``<outputs>/<bench>/<model>/<method>/.calibration/<hash>/``, so that
targets share it and the same command again tries nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from experiments.benches.base import Bench
from experiments.content import input_digest
from experiments.models.load import LoadedModel, load_model
from experiments.run_environments import environments_of
from experiments.settings.config import ConfigError, MatchConfig, RunConfig, digest, parameters
from experiments.settings.console import log_to
from experiments.settings.environment import describe_environment
from experiments.settings.knobs import middle, settings_at
from experiments.settings.names import changed_parameters, describe
from experiments.store import Record, RunStore
from pbs.methods import METHODS, Knob, build_method

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """One value of the knob, and what it gives on the held-out prompts."""

    value: float
    density: float
    coverage: float


@dataclass(frozen=True)
class Calibration:
    """What was asked for, and how near the knob comes.

    Attributes:
        quantity: "density" or "coverage".
        target: of it.
        tolerance: how far from the target counts as met.
        knob: the parameter that was set.
        value: its value; None if the target is out of reach.
        held_out: the quantity on the held-out prompts at that value; if the target is out of reach,
            the nearest that the knob gives.
        is_met: whether ``held_out`` is within the tolerance. A value can miss a target within
            reach, where the quantity jumps from one value of the knob to the next.
        prompts: ids of the held-out prompts.
        trials: in the order of the search.
    """

    quantity: str
    target: float
    tolerance: float
    knob: str
    value: float | None
    held_out: float
    is_met: bool
    prompts: tuple[str, ...]
    trials: tuple[Trial, ...]

    @property
    def is_reachable(self) -> bool:
        """Whether a value was found."""
        return self.value is not None

    def facts(self) -> dict[str, Any]:
        """For ``metrics.json`` and tables: of the prompts their number, of the trials nothing."""
        hidden = ("prompts", "trials", "tolerance")
        shown = {key: value for key, value in asdict(self).items() if key not in hidden}
        return {**shown, "num_prompts": len(self.prompts)}

    def explain(self) -> str:
        """One sentence on a target that cannot be met."""
        reached = [getattr(trial, self.quantity) for trial in self.trials]
        values = [trial.value for trial in self.trials]
        return (
            f"{self.quantity} {self.target:g} is out of reach: {self.knob} from {min(values)} to "
            f"{max(values)} gives {min(reached):.3f} to {max(reached):.3f} on "
            f"{len(self.prompts)} held-out prompts"
        )


def calibrate(cfg: RunConfig, make_bench: Callable[[], Bench]) -> tuple[RunConfig, Calibration]:
    """Find the value of the method's knob that meets the target on held-out prompts.

    Args:
        cfg: a configuration with ``match``; the method has a knob.
        make_bench: makes the bench, which gives the prompts.

    Returns:
        The configuration with the method's settings at that value (unchanged if there is none), and
        how the value was found.

    Raises:
        ConfigError: the method's settings include the knob itself, or the bench has no held-out
            prompts.
    """
    match, knob = cfg.match, METHODS.load(cfg.method["name"]).knob
    _check_untouched(cfg, knob)
    store = RunStore(_folder(cfg))
    with store.lock(), log_to(store.log_path):
        if not cfg.resume:
            store.clear()
        trials = {record["value"]: _trial(record) for record in store.samples()}

        @cache
        def prompts() -> tuple[LoadedModel, Bench, list[tuple[str, Tensor]]]:
            model, bench = load_model(cfg.model), make_bench()
            return model, bench, _held_out(cfg, model, bench)

        def measure(value: float) -> Trial:
            if value not in trials:
                record = _measure(settings_at(cfg.method, knob, value), *prompts())
                record |= {"sample_id": f"{knob.name}={value}", "value": value}
                record |= {"environment": describe_environment()["id"]}
                with store.appending() as appender:
                    appender.append(record)
                trials[value] = _trial(record)
            return trials[value]

        path = search(measure, knob, match)
        records = store.samples()
    if len(environments_of(records)) > 1:
        logger.warning(
            "%s: the values of %s were tried in %d environments; resume=false tries all again",
            cfg.method["name"],
            knob.name,
            len(environments_of(records)),
        )
    calibration = _conclude(path, knob, match, records[0]["prompts"])
    if not calibration.is_reachable:
        return cfg, calibration
    logger.info(
        "%s: %s=%g gives %s %.3f (target %g) on %d held-out prompts",
        cfg.method["name"],
        knob.name,
        calibration.value,
        match.quantity,
        calibration.held_out,
        match.target,
        len(calibration.prompts),
    )
    if not calibration.is_met:
        logger.warning(
            "%s: no value of %s comes nearer to %s %g than %.3f",
            cfg.method["name"],
            knob.name,
            match.quantity,
            match.target,
            calibration.held_out,
        )
    method = {**cfg.method, **settings_at(cfg.method, knob, calibration.value)}
    return replace(cfg, method=method), calibration


def search(measure: Callable[[float], Trial], knob: Knob, match: MatchConfig) -> list[Trial]:
    """Bisection between the ends of the knob; stops within the tolerance of the target.

    Args:
        measure: what a value gives.
        knob: its range and direction.
        match: target, tolerance and the number of values to try.

    Returns:
        All trials, in their order. If the target lies beyond both ends, only these two.
    """

    def reached(trial: Trial) -> float:
        return getattr(trial, match.quantity)

    ends = [measure(knob.low), measure(knob.high)]
    path = list(ends)
    # More computed is more covered: both quantities follow the knob the same way.
    sparse, dense = ends if knob.increases_density else ends[::-1]
    if not reached(sparse) <= match.target <= reached(dense):
        return path
    while len(path) < match.max_steps and _miss(path, match) > match.tolerance:
        value = middle(sparse.value, dense.value, knob)
        if value in (sparse.value, dense.value):
            break
        path.append(measure(value))
        if reached(path[-1]) < match.target:
            sparse = path[-1]
        else:
            dense = path[-1]
    return path


def _conclude(
    path: Sequence[Trial], knob: Knob, match: MatchConfig, prompts: Sequence[str]
) -> Calibration:
    """The trial nearest to the target; none if the target lies beyond the ends of the knob."""
    reached = [getattr(trial, match.quantity) for trial in path]
    # Of equally near ones the last: bisection ends at the edge of a plateau.
    best = min(reversed(range(len(path))), key=lambda index: abs(reached[index] - match.target))
    is_met = abs(reached[best] - match.target) <= match.tolerance
    is_reachable = is_met or min(reached) <= match.target <= max(reached)
    return Calibration(
        quantity=match.quantity,
        target=match.target,
        tolerance=match.tolerance,
        knob=knob.name,
        value=path[best].value if is_reachable else None,
        held_out=reached[best],
        is_met=is_met,
        prompts=tuple(prompts),
        trials=tuple(path),
    )


def _measure(
    settings: dict[str, Any],
    model: LoadedModel,
    bench: Bench,
    prompts: Sequence[tuple[str, Tensor]],
) -> Record:
    """Mean density and coverage over the prompts, each as the bench measures it."""
    from experiments.benches.needle import prefill
    from pbs.patch.huggingface import apply_patch_with_prefill, get_patch

    method = build_method(settings["name"], **parameters(settings))
    density, coverage = [], []
    with apply_patch_with_prefill(model.model, method):
        patch = get_patch(model.model)
        for _, inputs in prompts:
            patch.reset()
            method.recorder = probe = bench.coverage_probe(model)
            prefill(model, inputs)
            density.append(patch.report().density)
            coverage.append(probe.mean())
    return {
        "density": sum(density) / len(density),
        "coverage": sum(coverage) / len(coverage),
        "prompt_density": density,
        "prompt_coverage": coverage,
        "prompts": [name for name, _ in prompts],
        "input_digests": [input_digest(ids) for _, ids in prompts],
        "settings": parameters(settings),
    }


def _held_out(cfg: RunConfig, model: LoadedModel, bench: Bench) -> list[tuple[str, Tensor]]:
    match = cfg.match
    prompts = bench.held_out(
        model, lengths=match.lengths, num_prompts=match.num_prompts, seed=cfg.seed
    )
    logger.info("%s: setting the knob on %d held-out prompts", describe(cfg.method), len(prompts))
    return prompts


def _check_untouched(cfg: RunConfig, knob: Knob) -> None:
    """The knob cannot be set by hand as well."""
    changed = changed_parameters(METHODS, cfg.method)
    for name in (knob.name, *knob.fixed):
        if name in changed and changed[name] != knob.fixed.get(name):
            raise ConfigError(
                f"match sets method.{name} of {cfg.method['name']} itself, got "
                f"method.{name}={changed[name]}; leave it out, or run without match"
            )


def _folder(cfg: RunConfig) -> Any:
    """Where the trials are kept: the same for all targets."""
    match = cfg.match
    identity = {
        "model": cfg.model_identity,
        "method": cfg.identity_without_paths("method"),
        "bench": cfg.identity_without_paths("bench"),
        **({"inputs": cfg.inputs} if cfg.inputs else {}),
        # Other rules of drawing prompts are other words: no trials on other prompts are mixed in.
        "prompts": [match.lengths, match.num_prompts, "pairs of task and depth in turn"],
        "seed": cfg.seed,
    }
    return cfg.group / cfg.method["name"] / ".calibration" / digest(identity)


def _trial(record: Record) -> Trial:
    return Trial(record["value"], record["density"], record["coverage"])


def _miss(path: Sequence[Trial], match: MatchConfig) -> float:
    """Distance of the nearest trial from the target."""
    return min(abs(getattr(trial, match.quantity) - match.target) for trial in path)

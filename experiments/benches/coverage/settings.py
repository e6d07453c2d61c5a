"""At which values of its knob ``bench=coverage`` measures a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.settings.config import parameters
from experiments.settings.knobs import middle, settings_at
from pbs.methods import METHODS, AttentionMethod, Knob, build_method

# A density this near to the one asked for will do; and how often to halve towards it.
TOLERANCE = 0.005
MAX_PASSES = 12
# Digits of values that are spread over a knob's range.
DIGITS = 3


@dataclass(frozen=True)
class Setting:
    """The method at one setting.

    Attributes:
        value: of its knob; None if the knob does not apply (no knob, or another preset).
        is_own: whether this is the run's own setting.
        method: the method.
        target: density that the value was chosen for, if it was.
    """

    value: float | None
    is_own: bool
    method: AttentionMethod
    target: float | None = None


def settings_of(
    method: Mapping[str, Any],
    values: Sequence[float],
    *,
    targets: Sequence[float] | None = None,
) -> list[Setting]:
    """The method's own setting, then the method at each of these values.

    A value that is the own setting does not come again, unless it was chosen for a target.

    Args:
        method: name and parameters.
        values: of its knob; none for a method without one.
        targets: densities that the values were chosen for.

    Raises:
        ValueError: the knob does not take one of the values.
    """
    own = dict(method)
    knob: Knob | None = METHODS.load(own["name"]).knob
    settings = [Setting(_value(own, knob), True, build_method(own["name"], **parameters(own)))]
    for index, value in enumerate(values):
        changed = settings_at(own, knob, int(value) if knob.is_integer else value)
        if changed != own or targets is not None:
            built = build_method(changed["name"], **parameters(changed))
            target = None if targets is None else targets[index]
            settings.append(Setting(_value(changed, knob), False, built, target))
    return settings


def spread_values(knob: Knob, count: int, *, longest: int) -> list[float]:
    """Values over a knob's range: closer together at the dense end, where coverage is high.

    Args:
        knob: of a method.
        count: how many, from 0.
        longest: prompt, in tokens: counts of tokens are spread by ratio, up to it.
    """
    steps = [(index + 1) / count for index in range(count)]
    if knob.is_integer:
        high = min(knob.high, longest)
        return sorted({round(knob.low * (high / knob.low) ** step) for step in steps})
    shares = [1 - (1 - step) ** 2 for step in steps]
    if not knob.increases_density:
        shares = [1 - share for share in shares]
    width = knob.high - knob.low
    return sorted(round(knob.low + width * share, DIGITS) for share in shares)


def find_values(
    measure: Callable[[Sequence[float]], Sequence[float]], knob: Knob, targets: Sequence[float]
) -> list[float]:
    """The values of a knob that come nearest to some densities.

    All targets are halved towards at once, so that a pass over the model serves all of them. A
    target beyond the ends of the knob gets the nearer end.

    Args:
        measure: densities at some values.
        knob: its range and direction.
        targets: densities.
    """
    trials: dict[float, float] = {}
    wanted = {knob.low, knob.high}
    for _ in range(MAX_PASSES):
        values = sorted(wanted - trials.keys())
        if not values:
            break
        trials |= dict(zip(values, measure(values), strict=True))
        wanted = {_next_value(trials, knob, target) for target in targets}
    return [_nearest(trials, target) for target in targets]


def _next_value(trials: Mapping[float, float], knob: Knob, target: float) -> float:
    """Halfway between the trials around the target; the nearest again if it will do."""
    nearest = _nearest(trials, target)
    below = [value for value, density in trials.items() if density < target]
    above = [value for value, density in trials.items() if density >= target]
    if abs(trials[nearest] - target) <= TOLERANCE or not below or not above:
        return nearest
    if knob.increases_density:
        return middle(max(below), min(above), knob)
    return middle(max(above), min(below), knob)


def _nearest(trials: Mapping[float, float], target: float) -> float:
    return min(trials, key=lambda value: abs(trials[value] - target))


def _value(settings: Mapping[str, Any], knob: Knob | None) -> float | None:
    """The knob's value, if the other parameters let it act."""
    if knob is None or any(settings[name] != value for name, value in knob.fixed.items()):
        return None
    value = settings[knob.name]
    return value if isinstance(value, int | float) else None

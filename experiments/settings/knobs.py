"""Values of a method's knob."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pbs.methods.base import Knob

# Digits of a knob's value: it stands in folders' configurations and in tables.
DIGITS = 6


def settings_at(method: Mapping[str, Any], knob: Knob, value: float) -> dict[str, Any]:
    """A method's settings (its name and parameters) with the knob at this value."""
    settings = {**method, **knob.fixed, knob.name: value}
    for name in knob.proportional:
        settings[name] = int(method[name] / method[knob.name] * value)
    return settings


def middle(a: float, b: float, knob: Knob) -> float:
    """Halfway between two values; of counts, which range over many sizes, by ratio."""
    if knob.is_integer:
        return round((a * b) ** 0.5)
    return round((a + b) / 2, DIGITS)

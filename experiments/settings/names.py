"""How settings are called in tables and messages: by what differs from the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from pbs.methods import METHODS
from pbs.registry import Registry


def changed_parameters(registry: Registry, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that differ from the dataclass's defaults."""
    changed = {}
    for entry in fields(registry.load(settings["name"])):
        if not entry.init or entry.name not in settings:
            continue
        default = entry.default
        if entry.default_factory is not MISSING:
            default = entry.default_factory()
        if settings[entry.name] != default:
            changed[entry.name] = settings[entry.name]
    return changed


def describe(method: Mapping[str, Any]) -> str:
    """A method's name with the parameters that are not at their defaults."""
    changed = changed_parameters(METHODS, method)
    return " ".join([method["name"], *(f"{key}={value}" for key, value in changed.items())])


def as_word(value: Any) -> str:
    """A value as Hydra's command line reads it."""
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(as_word, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}: {as_word(one)}' for key, one in value.items())}}}"
    return str(value).lower() if isinstance(value, bool) else str(value)

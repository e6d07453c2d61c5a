"""Checks of settings that types cannot express, and what a type expects in words."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, Union, get_args, get_origin, get_type_hints

# Integers beyond cannot be counts, sizes or seeds: they fit into no tensor.
LARGEST = 2**63 - 1
_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
_PLURALS = {int: "integers", float: "numbers", bool: "true or false", str: "texts"}


def check_numbers(value: Any, where: str = "") -> None:
    """Refuse NaN, infinity and integers beyond 64 bits anywhere in plain data.

    Raises:
        ValueError: naming the entry, as in "bench.depths[1]".
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, got {value}")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{where} must fit into 64 bits, got {shorten(value)}")
    if isinstance(value, Mapping):
        for key, entry in value.items():
            check_numbers(entry, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            check_numbers(entry, f"{where}[{index}]")


def check_lists(target: type, settings: Mapping[str, Any], where: str) -> None:
    """Check the entries of lists, which OmegaConf lets pass when they are lists themselves.

    Args:
        target: the dataclass that the settings are the fields of.
        settings: its fields.
        where: what they are called on the command line: "bench".

    Raises:
        ValueError: an entry of another type than the field says.
    """
    hints = get_type_hints(target)
    for key, value in settings.items():
        kind = _entry_type(hints.get(key))
        if kind is None or not isinstance(value, list | tuple):
            continue
        for entry in value:
            is_number = kind is float and isinstance(entry, int)
            if isinstance(entry, bool) or not (isinstance(entry, kind) or is_number):
                expected = describe_type(hints[key])
                raise ValueError(f"{where}.{key} must be {expected}, got {shorten(value)}")


def check_keys(target: type, settings: Mapping[str, Any], where: str) -> None:
    """Check that every key is a field of the dataclass.

    Raises:
        ValueError: naming the nearest field.
    """
    from pbs.registry import unknown  # with torch, which a help text does not need

    valid = [entry.name for entry in fields(target) if entry.init]
    for key in settings:
        if key not in valid:
            raise ValueError(unknown(where, key, valid))


def describe_type(hint: Any) -> str:
    """What a field expects: "an integer", "a list of numbers such as [1,2]", "a text or null"."""
    inner, is_optional = _without_none(hint)
    origin = get_origin(inner) or inner
    if origin in (list, tuple, Sequence):
        words = f"a list of {_PLURALS.get((get_args(inner) or (str,))[0], 'values')}"
        words += " such as [a,b]" if (get_args(inner) or (str,))[0] is str else " such as [1,2]"
    elif isinstance(origin, type) and issubclass(origin, Enum):
        words = f"one of {', '.join(entry.name for entry in origin)}"
    elif origin is dict:
        words = "a mapping such as {key: value}"
    else:
        words = _WORDS.get(origin, "a group's settings" if is_dataclass(origin) else "a value")
    return f"{words} or null" if is_optional else words


def shorten(value: Any, limit: int = 80) -> str:
    """A value as text for an error message, cut if it is long."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _entry_type(hint: Any) -> type | None:
    """The scalar type of a list's entries; None for everything else."""
    inner, _ = _without_none(hint)
    if get_origin(inner) is not list:
        return None
    kind = get_args(inner)[0]
    return kind if kind in _WORDS else None


def _without_none(hint: Any) -> tuple[Any, bool]:
    """The type less None, and whether None was among its choices."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    inner = [part for part in get_args(hint) if part is not type(None)]
    return (inner[0] if len(inner) == 1 else Any), len(inner) < len(get_args(hint))

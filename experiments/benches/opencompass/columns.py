"""What the columns of a benchmark's rows must hold, so that no sample is scored on nonsense."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: key of the row.
        expected: in words, for the error message.
        holds: whether a value is fine.
    """

    name: str
    expected: str
    holds: Callable[[Any], bool]


@cache
def any_value(name: str) -> Column:
    """A column that may hold anything. Equal columns are one object: rows are cached by them."""
    return Column(name, "any value", lambda _: True)


@cache
def text(name: str) -> Column:
    """A text, which may be empty."""
    return Column(name, "a text", _is_text)


@cache
def filled_text(name: str) -> Column:
    """A text that is not empty."""
    return Column(name, "a text that is not empty", _is_filled)


@cache
def texts(name: str) -> Column:
    """A list of at least one text."""
    return Column(name, "a list of at least one text", _are_texts)


@cache
def one_of(name: str, *valid: str) -> Column:
    """One of a few words."""
    return Column(name, f"one of {', '.join(valid)}", lambda value: value in valid)


def problem(row: Any, columns: tuple[Column, ...]) -> str:
    """What is wrong with a row; "" if nothing is."""
    if not isinstance(row, Mapping):
        return f"expected a JSON object, got {row!r:.60}"
    absent = [column.name for column in columns if column.name not in row]
    if absent:
        names = ", ".join(column.name for column in columns)
        return f"expected the columns {names}, missing {', '.join(absent)}"
    for column in columns:
        value = row[column.name]
        if not column.holds(value):
            return f"{column.name} must be {column.expected}, got {value!r:.60}"
    return ""


def _is_text(value: Any) -> bool:
    """Whether a value is a text that can be written: JSON can hold halves of a character."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_filled(value: Any) -> bool:
    return _is_text(value) and value.strip() != ""


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_text(entry) for entry in value)

"""Per-head patterns in the JSON format of microsoft/MInference."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pbs.registry import unknown

VERTICAL_SLASH = "vertical_and_slash"
A_SHAPE = "stream_llm"
BLOCK_SPARSE = "block_sparse"
PATTERNS = (VERTICAL_SLASH, A_SHAPE, BLOCK_SPARSE)


@dataclass(frozen=True)
class HeadSetting:
    """Pattern of one query head.

    Attributes:
        pattern: one of ``PATTERNS``.
        sizes: (vertical size, slash size) of a vertical-slash head, (n_init, n_local) of an A-shape
            head; without meaning for block-sparse heads.
    """

    pattern: str
    sizes: tuple[int, int]


def load_head_settings(path: str) -> list[list[HeadSetting]]:
    """Read a file of head patterns: per layer, the heads in order.

    The file is a list with one object per layer; its keys are query head indices as strings, its
    values ``[pattern, a, b, score]``. The score of the pattern search is not used.

    Args:
        path: the file; relative paths are relative to the working directory.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or not of this form; a layer misses heads, or has other heads than the
            first; an unknown pattern.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"no head configuration at {path}; expected a JSON file in MInference's format, such "
            "as those in minference/configs of microsoft/MInference"
        )
    try:
        layers = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except _TwiceError as error:
        raise ValueError(f"{path}: {error}; every head needs one entry") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON in UTF-8: {error}; copy the file again") from error
    if not isinstance(layers, list) or not layers:
        raise ValueError(f"{path}: expected a list with one object per layer, got {_kind(layers)}")
    settings = [_layer(layer, f"{path}, layer {index}") for index, layer in enumerate(layers)]
    for index, layer in enumerate(settings):
        if len(layer) != len(settings[0]):
            raise ValueError(
                f"{path}: every layer must have the same heads; layer 0 has {len(settings[0])}, "
                f"layer {index} has {len(layer)}. Add the missing heads"
            )
    return settings


def _layer(heads: object, where: str) -> list[HeadSetting]:
    """The heads of one layer in order."""
    if not isinstance(heads, dict) or not heads:
        raise ValueError(f"{where}: expected an object of heads, got {_kind(heads)}")
    entries = {}
    for key, value in heads.items():
        if not key.isdecimal() or key != str(int(key)):
            raise ValueError(
                f"{where}: expected head indices as keys ('0', '1', ...), got {_short(key)}"
            )
        entries[int(key)] = _head(value, f"{where}, head {key}")
    missing = sorted(set(range(max(entries) + 1)) - set(entries))
    if missing:
        raise ValueError(
            f"{where}: expected heads 0 to {max(entries)}, missing "
            f"{', '.join(map(str, missing))}. Every head needs an entry"
        )
    return [entries[index] for index in sorted(entries)]


def _head(value: object, where: str) -> HeadSetting:
    """One head's ``[pattern, a, b, score]``."""
    if not isinstance(value, list) or len(value) not in (3, 4):
        raise ValueError(f"{where}: expected [pattern, a, b, score], got {_short(value)}")
    pattern, *sizes = value[:3]
    if pattern not in PATTERNS:
        raise ValueError(f"{where}: {unknown('pattern', f'{pattern!s:.80}', PATTERNS)}")
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(f"{where}: expected two integers of at least 0, got {_short(sizes)}")
    if pattern == A_SHAPE and sizes[1] < 1:
        raise ValueError(f"{where}: expected a local window of at least 1, got {sizes}")
    return HeadSetting(pattern, (sizes[0], sizes[1]))


class _TwiceError(ValueError):
    """A key of an object that is there more than once: readers differ in which one they take."""


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The object of these pairs."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(f"key {next(_short(key) for key in keys if keys.count(key) > 1)} twice")
    return entries


def _short(value: object) -> str:
    """A value for an error message, cut if it is long."""
    return f"{value!r:.80}"


def _kind(value: object) -> str:
    """What was found instead, for error messages."""
    if value is None:
        return "null"
    return f"an empty {type(value).__name__}" if not value else f"a {type(value).__name__}"

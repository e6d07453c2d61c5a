"""Texts that users name by their files."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.benches.texts import named_text
from experiments.settings.config import ConfigError

NEEDLE, GENERATED = "needle", "generated"


def text_files(setting: str, text: str | None) -> dict[str, Path]:
    """The file that a setting names, by the setting; empty for prompts that are generated."""
    if text in (None, NEEDLE, GENERATED):
        return {}
    path = named_text(text)
    return {setting: path} if path.is_file() else {}


def read_texts(path: Path, count: int, *, setting: str = "bench.texts") -> list[str]:
    """The longest texts of a file, longest first.

    Args:
        path: JSON (a list) or JSON lines; each entry has a text under "context".
        count: how many.
        setting: what the user set to this path, for error messages.

    Raises:
        ConfigError: no such file, or an entry without a text.
    """
    if not path.is_file():
        raise ConfigError(f"{setting}={path}: no such file")
    try:
        content = path.read_text(encoding="utf-8")
        if content.lstrip().startswith("["):
            entries = json.loads(content)
        else:
            entries = [json.loads(line) for line in content.splitlines() if line.strip()]
        texts = [entry["context"] for entry in entries]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f'{setting}={path}: expected a text under "context" in every entry of a JSON list or '
            f"of JSON lines ({type(error).__name__}: {error})"
        ) from error
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ConfigError(f"{setting}={path} has no texts, or one that is empty or no text")
    return sorted(texts, key=len, reverse=True)[:count]

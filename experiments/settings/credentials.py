"""Keys of W&B and the hub: they come from the environment and are written nowhere."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

VARIABLES = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_NAMES = re.compile(r"api_?key|hf_token|hub_token|password", re.IGNORECASE)
# What is shorter is a placeholder, and may stand in any text.
_SHORTEST = 8
_ADVICE = (
    "settings are written to config.yaml, metrics.json and the logs; set the environment variable "
    "WANDB_API_KEY (or HF_TOKEN), or use `wandb login` (`hf auth login`)"
)


def refuse_in_words(words: Sequence[str]) -> None:
    """Refuse a key on the command line, where Hydra would write it to the settings of a sweep.

    Raises:
        ValueError: naming the setting, not its value.
    """
    for word in words:
        if _NAMES.search(word) or _contains_key(word):
            name = word.partition("=")[0] if "=" in word else "a word"
            raise ValueError(f"{hide(name)} looks like a secret: {_ADVICE}")


def refuse_in_settings(value: Any, where: str = "") -> None:
    """Refuse a key of this process's environment in plain data, as an interpolation brings it.

    Raises:
        ValueError: naming the setting, not its value.
    """
    if isinstance(value, Mapping):
        for key, entry in value.items():
            refuse_in_settings(entry, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for entry in value:
            refuse_in_settings(entry, where)
    elif isinstance(value, str) and _contains_key(value):
        raise ValueError(f"{where} contains a secret: {_ADVICE}")


def hide(text: str) -> str:
    """The text with every key of this process's environment replaced by its variable's name."""
    for name, key in _keys().items():
        text = text.replace(key, f"<{name}>")
    return text


def _contains_key(text: str) -> bool:
    return any(key in text for key in _keys().values())


def _keys() -> dict[str, str]:
    values = {name: os.environ.get(name, "") for name in VARIABLES}
    return {name: value for name, value in values.items() if len(value) >= _SHORTEST}

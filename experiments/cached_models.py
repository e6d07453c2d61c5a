"""The cache folder: what is fetched by package once and is not part of the project.

``$PBS_CACHE`` if it is set, else ``pbs-attn`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``. It says
where files lie, never what they hold: that their digests check.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from experiments.errors import ConfigError

# A model.path that begins so is a folder in the cache.
PREFIX = "cache:"
_COMMANDS = {"smollm2": "make model-smollm2"}


def cache_folder() -> Path:
    """Where fetched models and texts lie; made by those who write there."""
    if own := os.environ.get("PBS_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pbs-attn"


def model_folder(path: str) -> Path:
    """Folder that ``model.path=cache:NAME`` names, whether or not it is there."""
    return cache_folder() / "models" / path.removeprefix(PREFIX)


def cached_model(path: str) -> Path:
    """As :func:`model_folder`, for a model that is there.

    Raises:
        ConfigError: unknown, or not fetched yet; says the command.
    """
    name, folder = path.removeprefix(PREFIX), model_folder(path)
    if name not in _COMMANDS:
        raise ConfigError(f"model.path={path}: expected {PREFIX} and one of {', '.join(_COMMANDS)}")
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model.path={path} is not there yet ({folder}); fetch and convert it once with: "
            f"{_COMMANDS[name]}"
        )
    return folder


def sha256_of(path: Path) -> str:
    """Digest of a whole file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

"""Digests of what results depend on: files, checkpoints, source code, and what a model saw.

Importable without hydra and without torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.cached_models import PREFIX, model_folder

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pbs", "baselines", "experiments")  # what computes a result
DIGITS = 16
UNREADABLE = "unreadable"
# Files of at least this many bytes keep their digest on disk: reading 16 GB takes half a minute.
LARGE_BYTES = 16 * 2**20
# A file that was written this recently may be written again within one tick of its clock.
SETTLED_SECONDS = 2.0
# Files beside a checkpoint that nothing reads: weights come from safetensors alone.
IGNORED = frozenset({".md", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5"})
NESTED = ("*.py", "*.jinja")  # code and chat templates may lie in folders of their own


def input_digest(*inputs: Tensor | Sequence[int] | str) -> str:
    """Digest of what a model saw: token ids, or text where there are no ids at hand.

    Args:
        inputs: tensors of any shape and dtype, lists of integers, or texts. Ids give the same
            digest as a list and as a tensor of any integer dtype, shape and device.

    Returns:
        The first 16 hexadecimal digits of a SHA-256.
    """
    sha = hashlib.sha256()
    for entry in inputs:
        content = entry.encode() if isinstance(entry, str) else _bytes(entry)
        sha.update(f"{len(content)} ".encode() + content)
    return sha.hexdigest()[:DIGITS]


def _bytes(entry: Tensor | Sequence[int]) -> bytes:
    import torch

    values = torch.as_tensor(entry).detach().cpu().flatten()
    if not values.is_floating_point():
        values = values.to(torch.int64)
    return values.contiguous().view(torch.uint8).numpy().tobytes()


def file_digest(path: Path) -> str:
    """Digest of a whole file, 16 hexadecimal digits.

    Read once: the digest is kept, for large files also in the user's cache folder, until the
    file's size, inode or a time of its last change differ.

    Raises:
        OSError: the file cannot be read.
    """
    path = path.resolve()
    stat = path.stat()
    key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    known = _KNOWN.get(path)
    if known is not None and known[0] == key:
        return known[1]
    is_settled = time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED_SECONDS
    note = _note_of(path)
    digest = _read_note(note, key) if stat.st_size >= LARGE_BYTES else None
    if digest is None:
        if stat.st_size >= 64 * LARGE_BYTES:
            logger.info("reading %s once, to know its content again", path.name)
        digest = _read(path)
        if is_settled and stat.st_size >= LARGE_BYTES:
            _write_note(note, key, digest)
    if is_settled:
        _KNOWN[path] = (key, digest)
    return digest


_KNOWN: dict[Path, tuple[tuple[int, ...], str]] = {}


def _read(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            sha.update(piece)
    return sha.hexdigest()[:DIGITS]


def _note_of(path: Path) -> Path:
    """Where the digest of a large file is kept: a file for each, so that nobody waits."""
    cache_folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
    return cache_folder / "pbs" / "digests" / f"{name}.json"


def _read_note(note: Path, key: tuple[int, ...]) -> str | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        content = json.loads(note.read_text(encoding="utf-8"))
        if content["file"] == list(key):
            return str(content["digest"])
    return None


def _write_note(note: Path, key: tuple[int, ...], digest: str) -> None:
    from experiments.files import write_atomically

    with suppress(OSError):  # no such folder, or a full disk: it is read again
        write_atomically(note, json.dumps({"file": key, "digest": digest}))


def digests_of(files: Mapping[str, Path]) -> dict[str, str]:
    """Digests of files by their names; one that cannot be read is "unreadable".

    What cannot be read fails where it is needed, with a message that says for what.
    """
    digests = {}
    for name, path in files.items():
        digests[name] = UNREADABLE
        with suppress(OSError):
            digests[name] = file_digest(path)
    return digests


def checkpoint_files(path: str, *, has_weights: bool = True) -> dict[str, str] | None:
    """Digests of the files of a local checkpoint, whole, by their names in its folder.

    All that can change an answer: configuration, tokenizer, chat templates, every shard, and Python
    code that comes with it. Not hidden files, texts for people and pickles, which nothing reads.

    Args:
        path: as ``model.path``: a folder, absolute or relative to the current folder or the
            project's root; or a name on the hub.
        has_weights: whether the weights are read; random ones are drawn.

    Returns:
        None for a name on the hub, which says by itself which checkpoint it is.
    """
    if path.startswith(PREFIX):
        path = str(model_folder(path))
    if path.endswith(".gguf") and Path(path).expanduser().is_file():
        return digests_of({"weights.gguf": Path(path).expanduser()})
    folders = (Path(os.path.expanduser(path)), ROOT / path)
    folder = next((found for found in folders if (found / "config.json").is_file()), None)
    if folder is None:
        return None
    files = {str(file.relative_to(folder)): file for file in sorted(_parts_of(folder))}
    if not has_weights:
        files = {name: file for name, file in files.items() if file.suffix != ".safetensors"}
    return digests_of(files)


def _parts_of(folder: Path) -> Iterator[Path]:
    found = {file for file in folder.iterdir() if file.suffix.lower() not in IGNORED}
    for pattern in NESTED:
        found |= set(folder.rglob(pattern))
    for file in found:
        parts = file.relative_to(folder).parts
        if file.is_file() and not any(part.startswith((".", "__pycache__")) for part in parts):
            yield file


@cache
def source_digest() -> str:
    """Digest of the Python files of ``pbs``, ``baselines`` and ``experiments``.

    Taken once per process: what is edited afterwards is not what runs.
    """
    sha = hashlib.sha256()
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            sha.update(f"{file.relative_to(ROOT)} {_read(file)}\n".encode())
    return sha.hexdigest()[:DIGITS]

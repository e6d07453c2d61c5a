"""Where the data of the benches lie, and what to say when they do not."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from experiments.benches.opencompass.columns import Column, any_value, problem
from experiments.settings.config import ROOT, ConfigError

Row = dict[str, Any]


class MissingDataError(ConfigError):
    """Files of a bench are not there; the message says which, where and how to get them."""


def find_folder(data_dir: str) -> Path:
    """A folder of the user's: relative to where the command runs, or to the project.

    Raises:
        MissingDataError: no such folder.
    """
    for folder in (Path(os.path.expanduser(data_dir)), ROOT / data_dir):
        if data_dir and folder.is_dir():
            return folder.resolve()
    raise MissingDataError(
        f"bench.data_dir={data_dir}: no such folder; give the folder with the benchmark's files"
    )


def fetch(repository: str, filename: str, *, advice: str) -> Path:
    """A file of a data set on the Hugging Face hub, from the local cache if it is there.

    Args:
        repository: name of the data set.
        filename: path in it.
        advice: what to do instead, ends the error message.

    Raises:
        MissingDataError: the hub cannot be reached, or has no such file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(repository, filename, repo_type="dataset"))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MissingDataError(
            f"could not fetch {filename} of the data set {repository} from the Hugging Face hub: "
            f"{reason}\n{advice}"
        ) from error


def require(paths: Sequence[Path], *, advice: str) -> None:
    """Check that all files are there.

    Raises:
        MissingDataError: naming every missing one.
    """
    missing = [path for path in paths if not path.is_file()]
    if missing:
        names = "\n".join(f"  {path}" for path in missing)
        raise MissingDataError(f"expected these files, which are missing:\n{names}\n{advice}")


def read_lines(path: Path, member: str | None = None) -> Iterator[Row]:
    """Rows of a JSON-lines file, or of one inside a zip archive.

    Raises:
        MissingDataError: the archive has no such member.
        ValueError: no text in UTF-8, or a line that is no JSON.
    """
    where = str(path) if member is None else f"{path}, {member}"
    # Not splitlines(): texts may hold characters it takes for the end of a line.
    for number, line in enumerate(read_text(path, member).split("\n"), start=1):
        if line.strip():
            yield parse_json(line, f"{where}, line {number}")


def read_text(path: Path, member: str | None = None) -> str:
    """A file in UTF-8, with or without a byte order mark, or one inside a zip archive.

    Raises:
        MissingDataError: the archive has no such member.
        ValueError: neither UTF-8 nor an archive.
    """
    try:
        content = path.read_bytes() if member is None else _read_member(path, member)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"{path} is no zip archive that can be read ({error}); download it again"
        ) from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{member or path} is no text in UTF-8 (byte {error.start}); convert it, as with "
            "iconv -t utf-8, or download it again"
        ) from error


def _read_member(path: Path, member: str) -> bytes:
    """In memory: nothing of an archive is ever written to disk."""
    with zipfile.ZipFile(path) as archive:
        if member not in archive.namelist():
            raise MissingDataError(f"{path} has no {member} inside")
        return archive.read(member)


def parse_json(text: str, where: str) -> Any:
    """JSON without NaN and infinity.

    Raises:
        ValueError: naming ``where``.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON: {error}; download the file again") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def read_rows(
    path: str | Path, columns: Sequence[str | Column], member: str | None = None
) -> list[Row]:
    """Some columns of all rows; kept in memory for the next call with the same file.

    Args:
        path: JSON lines, a JSON list, or a zip archive that holds JSON lines.
        columns: to read, all of which every row must have; a name alone may hold any value.
        member: file in the archive.

    Raises:
        ValueError: a row without one of the columns or with a wrong value, or no rows.
    """
    path = Path(path)
    known = tuple(any_value(name) if isinstance(name, str) else name for name in columns)
    return _read_rows(path, known, member, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _read_rows(
    path: Path, columns: tuple[Column, ...], member: str | None, _changed: int
) -> list[Row]:
    is_list = member is None and path.suffix == ".json"
    rows = parse_json(read_text(path), str(path)) if is_list else read_lines(path, member)
    if is_list and not isinstance(rows, list):
        raise ValueError(f"{path}: expected a JSON list of rows, got {rows!r:.60}")
    kept = []
    for number, row in enumerate(rows):
        wrong = problem(row, columns)
        if wrong:
            raise ValueError(f"{member or path}, row {number}: {wrong}")
        kept.append({column.name: row[column.name] for column in columns})
    if not kept:
        raise ValueError(f"{member or path} has no rows; download it again")
    return kept

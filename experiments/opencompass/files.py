"""Where the data of the benches lie, and what to say when they do not."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from experiments.config import ROOT, ConfigError

Row = dict[str, Any]


class MissingDataError(ConfigError):
    """Files of a bench are not there; the message says which, where and how to get them."""


def find_folder(data_dir: str) -> Path:
    """A folder of the user's: relative to where the command runs, or to the project.

    Raises:
        MissingDataError: no such folder.
    """
    for folder in (Path(data_dir).expanduser(), ROOT / data_dir):
        if folder.is_dir():
            return folder.resolve()
    raise MissingDataError(f"bench.data_dir={data_dir}: no such folder")


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
        ValueError: a line that is no JSON.
    """
    if member is None:
        text = path.read_text(encoding="utf-8")
    else:
        with zipfile.ZipFile(path) as archive:
            if member not in archive.namelist():
                raise MissingDataError(f"{path} has no {member} inside")
            text = archive.read(member).decode("utf-8")
    # Not splitlines(): texts may hold characters it takes for the end of a line.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except ValueError as error:
            where = f"{path}, line {number}" if member is None else f"{path}, {member}, {number}"
            raise ValueError(f"{where}: no JSON: {error}") from error


def read_rows(path: str | Path, columns: Sequence[str], member: str | None = None) -> list[Row]:
    """The named columns of all rows; kept in memory for the next call with the same file.

    Args:
        path: JSON lines, a JSON list, or a zip archive that holds JSON lines.
        columns: to read, all of which every row must have.
        member: file in the archive.

    Raises:
        ValueError: a row without one of the columns, or no rows.
    """
    path = Path(path)
    return _read_rows(path, tuple(columns), member, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _read_rows(
    path: Path, columns: tuple[str, ...], member: str | None, _changed: int
) -> list[Row]:
    is_list = member is None and path.suffix == ".json"
    rows = json.loads(path.read_text(encoding="utf-8")) if is_list else read_lines(path, member)
    kept = []
    for number, row in enumerate(rows):
        absent = [column for column in columns if column not in row]
        if absent:
            raise ValueError(
                f"{member or path}, row {number}: expected the columns {', '.join(columns)}, "
                f"missing {', '.join(absent)}"
            )
        kept.append({column: row[column] for column in columns})
    if not kept:
        raise ValueError(f"{member or path} has no rows")
    return kept

"""Windows of running text: which tokens of which text are measured, and which are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.cached_models import cache_folder
from experiments.settings.config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

# Share of a text that windows are measured in; the rest is held out.
MEASURED = 0.8


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of a text.

    Attributes:
        name: unique among the windows of a bench.
        text: the text's name.
        start: its first token's number in the text.
        ids: ``[N]``, the beginning-of-text token first where the tokenizer sets one.
    """

    name: str
    text: str
    start: int
    ids: Tensor


def named_text(name: str) -> Path:
    """A file, or where a book of that name lies once it is fetched."""
    path = Path(name).expanduser()
    return path if path.is_file() or path.suffix else cache_folder() / "texts" / f"{name}.txt"


def read_text(name: str) -> str:
    """The content of a text, see :func:`named_text`.

    Raises:
        ConfigError: no such text, empty, or not UTF-8.
    """
    path = named_text(name)
    if not path.is_file():
        raise ConfigError(
            f"text {name}: no such file; give a file with running text, or fetch a book: "
            "python -m experiments.tools.texts fetch"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"text {name}: expected UTF-8 ({error})") from error
    if not text.strip():
        raise ConfigError(f"text {name} is empty")
    return text


def windows_of(
    name: str, tokenizer: Any, *, length: int, count: int, offset: int = 0
) -> list[Window]:
    """Windows spread evenly over the measured part of a text; they do not overlap.

    Args:
        name: of the text, see :func:`named_text`.
        tokenizer: of the model.
        length: N.
        count: how many.
        offset: tokens at the start that are left out.

    Raises:
        ConfigError: not a text, or too short.
    """
    ids, first = tokens_of(named_text(name), tokenizer)
    taken = length - len(first)
    end = int(MEASURED * len(ids))
    if end - offset < count * taken:
        raise ConfigError(
            f"bench.texts={name} has {len(ids)} tokens, {max(0, end - offset)} to measure in "
            f"(bench.offset={offset}, the last {1 - MEASURED:.0%} are held out); {count} windows "
            f"of {length} need {count * taken}"
        )
    step = (end - offset - taken) // (count - 1) if count > 1 else 0
    return [_window(name, ids, first, offset + index * step, length) for index in range(count)]


def held_out_windows(
    names: Sequence[str], tokenizer: Any, *, length: int, count: int
) -> list[Window]:
    """Windows of the texts' held-out parts, in turns; they may overlap one another.

    Raises:
        ConfigError: not a text, or its held-out part is shorter than a window.
    """
    found = []
    for number in range(count):
        name = names[number % len(names)]
        ids, first = tokens_of(named_text(name), tokenizer)
        begin, taken = int(MEASURED * len(ids)), length - len(first)
        room = len(ids) - begin - taken
        if room < 0:
            raise ConfigError(
                f"bench.texts={name}: the last {1 - MEASURED:.0%}, held out for match, are "
                f"{len(ids) - begin} tokens; match needs at least {taken}: give a longer text, or "
                "match.lengths=[...]"
            )
        turn, turns = number // len(names), -(-count // len(names))
        start = begin + (room * turn // (turns - 1) if turns > 1 else room // 2)
        found.append(_window(name, ids, first, start, length))
    return found


def _window(name: str, ids: Tensor, first: Tensor, start: int, length: int) -> Window:
    import torch

    text = Path(name).stem if Path(name).suffix else name
    tokens = torch.cat([first, ids[start : start + length - len(first)]])
    return Window(f"{text}-N{length}-{start}", text, start, tokens)


def tokens_of(path: Path, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """All tokens of a text, and the beginning-of-text token if the tokenizer sets one.

    Raises:
        ConfigError: no such file, empty, or not UTF-8.
    """
    if not path.is_file():
        raise ConfigError(f"bench.texts={path}: no such file")
    stat = path.stat()
    return _tokens(path, stat.st_mtime_ns, stat.st_size, tokenizer)


@lru_cache(maxsize=8)
def _tokens(path: Path, changed: int, size: int, tokenizer: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001 - names the content
    import torch

    text = read_text(str(path))
    begins = tokenizer("a")["input_ids"][:1]
    first = begins if begins == [tokenizer.bos_token_id] else []
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids), torch.tensor(first, dtype=torch.long)

"""Real books by Debian package, cleaned to running text in the cache; offline once they are there.

    python -m experiments.tools.texts list
    python -m experiments.tools.texts fetch debian-handbook

Fetching needs ``apt-get`` and ``dpkg-deb``, no rights and no installation. The books are not part
of the project; each keeps its licence, which ``list`` and ``fetch`` say.
"""

from __future__ import annotations

import argparse
import gzip
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory

from experiments.cached_models import cache_folder, sha256_of
from experiments.settings.config import ConfigError


@dataclass(frozen=True)
class Book:
    """A book.

    Attributes:
        package: Debian package.
        version: of it; its text may change with it.
        digest: SHA-256 of the package file.
        licence: of the text.
        read: from the unpacked package to running text.
    """

    package: str
    version: str
    digest: str
    licence: str
    read: Callable[[Path], str]


class _Prose(HTMLParser):
    """Collects text outside of navigation, heads, tables and listings."""

    _BLOCKS = frozenset({"p", "div", "li", "h1", "h2", "h3", "h4", "h5", "dt", "dd", "pre", "br"})
    _VOID = frozenset({"br", "img", "meta", "link", "hr", "input", "col"})
    _LEFT_OUT = frozenset({"head", "script", "style", "pre", "table"})
    _LEFT_OUT_CLASSES = frozenset({"docnav", "toc", "banner", "indexterm"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin leaving out, or go on counting how deep that is."""
        if tag in self._BLOCKS:
            self.parts.append("\n\n")
        if tag in self._VOID:
            return
        given = dict(attrs)
        classes = set(f"{given.get('class') or ''} {given.get('id') or ''}".split())
        is_left_out = tag in self._LEFT_OUT or classes & self._LEFT_OUT_CLASSES
        if self._depth or is_left_out:
            self._depth += 1

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A tag without content, as XHTML writes it, has no end to wait for."""

    def handle_endtag(self, tag: str) -> None:
        """Leave what was left out."""
        if self._depth and tag not in self._VOID:
            self._depth -= 1
        if tag in self._BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        """Keep the text."""
        if not self._depth:
            self.parts.append(data)


def html_to_text(html: str) -> str:
    """Running text of a page: a paragraph a line, with an empty line between."""
    parser = _Prose()
    parser.feed(html)
    return join_paragraphs("".join(parser.parts))


def join_paragraphs(text: str) -> str:
    """Undo line breaks inside paragraphs, which empty lines part."""
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _handbook(root: Path) -> str:
    """Its pages in their order, by the links to the next one."""
    folder = root / "usr/share/doc/debian-handbook/html/en-US"
    pages, name = [], "preface.html"
    seen: set[str] = set()
    while name and name not in seen and not name.startswith("ix"):
        seen.add(name)
        html = (folder / name).read_text(encoding="utf-8")
        pages.append(html_to_text(html))
        found = re.search(r'<link rel="next" href="([^"#]+)', html)
        name = found[1] if found else ""
    return "\n\n".join(pages)


def _policy(root: Path) -> str:
    text = gzip.decompress((root / "usr/share/doc/debian-policy/policy.txt.gz").read_bytes())
    # Neither underlines nor the lines of its table of contents.
    left_out = r"^([*=\-~^ \t]+|[ \t]*\* \d+\.[^\n]*(\n[ \t]+[^*\s][^\n]*)*)$"
    return join_paragraphs(re.sub(left_out, "", text.decode("utf-8"), flags=re.M))


BOOKS = {
    "debian-handbook": Book(
        package="debian-handbook",
        version="11.20220922",
        digest="3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
        licence="GPL-2+ or CC-BY-SA-3.0",
        read=_handbook,
    ),
    "debian-policy": Book(
        package="debian-policy",
        version="4.6.2.0",
        digest="ef9d01b625c3b87c3a845c2cd1b66f1a16e9240b2b9e5bee53472a00e8457a39",
        licence="GPL-2+",
        read=_policy,
    ),
}


def text_path(name: str) -> Path:
    """Where the text of a book lies once it is fetched."""
    return cache_folder() / "texts" / f"{name}.txt"


def fetch(name: str, package: Path | None = None) -> Path:
    """Fetch and clean a book unless it is there; returns the text's path.

    Args:
        name: one of ``BOOKS``.
        package: a copy of the package's file; default: apt-get downloads it.

    Raises:
        ConfigError: unknown, tools missing, no such version, another digest, or a changed text.
    """
    if name not in BOOKS:
        raise ConfigError(f"no book {name!r}; expected one of {', '.join(BOOKS)}")
    book, path = BOOKS[name], text_path(name)
    note = path.with_suffix(".sha256")
    if path.is_file():
        if not note.is_file() or note.read_text().strip() != sha256_of(path):
            raise ConfigError(f"{path} is not as it was written; remove it and fetch it again")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent) as scratch:
        root = Path(scratch)
        file = package or _download(book, root)
        if (digest := sha256_of(file)) != book.digest:
            raise ConfigError(
                f"{file.name} has SHA-256 {digest}, expected {book.digest}: another text than "
                "results are of"
            )
        _call("dpkg-deb", "--extract", str(file), str(root / "files"), folder=root)
        part = root / "text"
        part.write_text(book.read(root / "files") + "\n", encoding="utf-8")
        note.write_text(sha256_of(part) + "\n")
        part.replace(path)
    return path


def _download(book: Book, folder: Path) -> Path:
    _call("apt-get", "download", f"{book.package}={book.version}", folder=folder)
    return next(folder.glob("*.deb"))


def _call(*command: str, folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise ConfigError(f"fetching a book needs {command[0]}, which Debian and Ubuntu have")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=["list", "fetch"])
    parser.add_argument("names", nargs="*", help="books; default: all")
    options = parser.parse_args(arguments)
    try:
        for name in options.names or BOOKS:
            path = fetch(name) if options.action == "fetch" else text_path(name)
            state = f"{path.stat().st_size} bytes" if path.is_file() else "not fetched"
            licence = BOOKS[name].licence if name in BOOKS else "unknown"
            sys.stdout.write(f"{name} ({licence}): {path}, {state}\n")
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Every package an installation brings, for which part, under which licence: docs/dependencies.md.

python -m experiments.tools.dependencies          # writes the list of what is installed here
python -m experiments.tools.dependencies --check  # exit status 1 if the list lacks a package

Names and licences come from the packages' own metadata; whoever distributes more than this
project's sources should read the licence texts.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution, metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = "pbs-attn"
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "dependencies.md"
CORE = "core"
# Licences under which a work made of several parts can come under conditions as a whole.
_COPYLEFT = re.compile(r"\b(A|L)?GPL|General Public|MPL|Mozilla Public|EUPL|CeCILL", re.IGNORECASE)
_STRONG = re.compile(r"(?<!L)(?<!Lesser )\b(A?GPL|(GNU )?(Affero )?General Public)", re.IGNORECASE)
_LONGEST = 60

_HEAD = """\
# Dependencies and their licences

What `pip install -e '.[{extras}]'` brings, by the part that asks for it, in
the words of its own metadata. Written by `python -m experiments.tools.dependencies` from what is
installed; with `--check` it compares.

The project itself is under the Apache License 2.0 and contains no code of these packages. **The
extra `eval` brings packages under the GPL**, because OpenCompass, itself under Apache-2.0, asks for
them; nothing in the core or in the other extras needs them. Who passes on an environment or an
image with `eval` in it passes on GPL software and its conditions.

- GPL: {strong}
- weaker copyleft: {weak}

A CUDA build of torch comes with packages of NVIDIA under NVIDIA's terms. A list that was written
without one does not show them.

## Known vulnerabilities

`make audit` looks every installed package up (pip-audit, in an environment of its own; it needs
the Python Package Index itself) and lists those it could not look up: builds with a local version,
and everything behind a mirror without vulnerability data, where "no known vulnerabilities" means
nothing. It is no part of CI: its answer changes without any change here.

What the project does on its side: no pickle of weights or data is read, a checkpoint's own code is
not run unless `model.trust_remote_code=true` asks for it, data sets are read as JSON, templates of
chats run in a sandbox, and keys of W&B and the hub come from the environment and are written
nowhere. Tests: `tests/reliability/test_security.py`.
"""


@dataclass
class Package:
    """An installed package.

    Attributes:
        name: as in its metadata.
        version: installed.
        licence: in the words of its metadata.
        parts: "core" and names of extras that bring it.
        is_direct: whether pyproject.toml names it.
    """

    name: str
    version: str
    licence: str
    parts: set[str] = field(default_factory=set)
    is_direct: bool = False


def list_packages() -> list[Package]:
    """All installed packages that the project or one of its extras brings, by name."""
    found: dict[str, Package] = {}
    extras = metadata(PROJECT).get_all("Provides-Extra") or []
    for part in (CORE, *extras):
        for requirement in _requirements(distribution(PROJECT), frozenset({part})):
            name = canonicalize_name(requirement.name)
            for package in _closure(requirement):
                known = found.setdefault(canonicalize_name(package.name), package)
                known.parts.add(part)
            if name in found:
                found[name].is_direct = True
    return [found[name] for name in sorted(found)]


def licence_of(package: Distribution) -> str:
    """The licence in a few words: the expression, the classifiers, or the field's first line."""
    data = package.metadata
    if data.get("License-Expression"):
        return data["License-Expression"]
    classified = [
        line.rpartition(" :: ")[2]
        for line in data.get_all("Classifier") or []
        if line.startswith("License ::") and line.rpartition(" :: ")[2] != "OSI Approved"
    ]
    text = ", ".join(classified) or (data.get("License") or "").strip().split("\n")[0]
    if not text or text.upper() == "UNKNOWN":
        return "not stated in its metadata"
    if re.fullmatch(r"[\w.-]+\.(txt|md|rst)", text):
        return f"see its {text}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def write_document(packages: Sequence[Package]) -> str:
    """The page: how to read it, and one table a part."""
    extras = sorted({part for package in packages for part in package.parts} - {CORE})
    copyleft = [package for package in packages if _COPYLEFT.search(package.licence)]
    strong = [package for package in copyleft if _STRONG.search(package.licence)]
    weak = [package for package in copyleft if package not in strong]
    lines = [_HEAD.format(extras=",".join(extras), strong=_names(strong), weak=_names(weak))]
    for part in (CORE, *extras):
        own = [p for p in packages if part in p.parts and (part == CORE or CORE not in p.parts)]
        title = "Core" if part == CORE else f"Extra `{part}`, beyond the core"
        lines += [f"## {title}", "", "| package | version | licence |", "| --- | --- | --- |"]
        for package in own:
            name = f"**{package.name}**" if package.is_direct else package.name
            lines.append(f"| {name} | {package.version} | {package.licence.replace('|', '/')} |")
        lines.append("")
    lines.append("Bold: named in pyproject.toml; the others come with them.")
    return "\n".join(lines) + "\n"


def missing_from(document: str, packages: Sequence[Package]) -> list[str]:
    """Installed packages that the page does not list: the direct ones and those under the GPL."""
    return [
        package.name
        for package in packages
        if (package.is_direct or _STRONG.search(package.licence))
        and f"| {package.name} |" not in document.replace("**", "")
    ]


def _closure(requirement: Requirement) -> Iterator[Package]:
    """The package of a requirement and all that it asks for, as far as they are installed."""
    queue, seen = deque([requirement]), set()
    while queue:
        wanted = queue.popleft()
        key = (canonicalize_name(wanted.name), frozenset(wanted.extras))
        if key in seen:
            continue
        seen.add(key)
        package = _installed(wanted.name)
        if package is None:
            continue
        yield Package(package.metadata["Name"], package.version, licence_of(package))
        queue.extend(_requirements(package, frozenset(wanted.extras)))


@cache
def _installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


@cache
def _requirements(package: Distribution, extras: frozenset[str]) -> list[Requirement]:
    """What a package asks for on this system, with these extras of its own."""
    found = []
    for text in package.requires or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            found.append(requirement)
    return found


def _names(packages: Sequence[Package]) -> str:
    return ", ".join(package.name for package in packages) or "none"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--out", type=Path, default=DOCUMENT, help="the page")
    options = parser.parse_args(argv)
    packages = list_packages()
    if options.check:
        missing = missing_from(options.out.read_text(encoding="utf-8"), packages)
        if missing:
            sys.stderr.write(
                f"{options.out} lacks {', '.join(missing)}; write it anew with "
                "python -m experiments.tools.dependencies\n"
            )
        return int(bool(missing))
    options.out.write_text(write_document(packages), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

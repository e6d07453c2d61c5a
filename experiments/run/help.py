"""The help text: every group with its options, and what the parameters of chosen ones mean."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields
from inspect import cleandoc
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments.settings.config import CONF
from experiments.settings.explain import GROUPS

WIDTH = 110
# The first sentence ends where another begins.
SENTENCE = re.compile(r"^(.*?\.)(?=\s+[A-Z]|$)")
SECTION = re.compile(r"^Args.*:$")
ENTRY = re.compile(r"^    (\w+): (.*)$")
COMMANDS = ("# python run.py", "# make ")
# A parameter that a base class explains.
ELSEWHERE = re.compile(r"^as (in|for) ", re.IGNORECASE)


def list_groups() -> str:
    """Every group with its options and the first sentence of each option's file."""
    lines = []
    for group in GROUPS:
        lines.append(f"  {group}")
        for path in sorted((CONF / group).glob("*.yaml")):
            lines += _entry(path.stem, _first_sentence(path))
    # Hydra fills in $NAMES in a help text.
    return ("\n".join(lines) + "\n").replace("$", "$$")


def explain_parameters(words: Sequence[str]) -> str:
    """The parameters of each method, order, selector and bench among the words of a command.

    Args:
        words: such as ``method=pbs``; others, and names that do not exist, are passed over.
    """
    parts = []
    for word in words:
        group, _, name = word.partition("=")
        found = _class_of(group, name)
        if found is None:
            continue
        place = {"order": "method.order_params", "selector": "method.selector_params"}
        lines = [f"Parameters of {word}"]
        chosen = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"))
        assert isinstance(chosen, dict)
        for field, text in parameters_of(found):
            default = chosen.get(field.name, _default(field))  # what the option's file says
            value = "" if default is MISSING else f"={default!r}"
            lines += _entry(f"{place.get(group, group)}.{field.name}{value}", text, wide=True)
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def parameters_of(found: type) -> Iterator[tuple[Field[Any], str]]:
    """The fields of a dataclass that a user sets, with what its docstrings say of them."""
    for field in fields(found):
        if field.init:
            yield field, _meaning(found, field.name)


def _class_of(group: str, name: str) -> type | None:
    from experiments.settings.bench_names import BENCHES
    from pbs.methods import METHODS
    from pbs.orders import ORDERS
    from pbs.selectors import SELECTORS

    registries = {"method": METHODS, "bench": BENCHES, "order": ORDERS, "selector": SELECTORS}
    registry = registries.get(group)
    is_option = (CONF / group / f"{name}.yaml").is_file()
    name = name.removesuffix("_authors")  # another setting of the same class
    if registry is None or not is_option or name not in registry.names:
        return None
    loaded: type = registry.load(name)
    return loaded


def _meaning(found: type, name: str) -> str:
    texts = [text for text in (_documented(one).get(name) for one in found.__mro__) if text]
    return next((text for text in texts if not ELSEWHERE.match(text)), "".join(texts[:1]))


def _documented(found: type) -> dict[str, str]:
    """Parameters by name, from the section of arguments in the class's own docstring."""
    texts: dict[str, str] = {}
    inside, name = False, ""
    for line in cleandoc(found.__dict__.get("__doc__") or "").splitlines():
        if not line.startswith(" ") and line:
            inside, name = bool(SECTION.match(line)), ""
            continue
        entry = ENTRY.match(line)
        if inside and entry:
            name = entry[1]
            texts[name] = entry[2]
        elif inside and name and line.strip():
            texts[name] += f" {line.strip()}"
    return {name: re.sub(r":\w+:`([^`]*)`", r"\1", text) for name, text in texts.items()}


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _first_sentence(path: Path) -> str:
    """Of a file's opening comment, without instructions to Hydra and commands."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("# ") or line.startswith(COMMANDS):
            if lines:
                break
        elif not line.startswith("# @package"):
            lines.append(line[2:])
    text = " ".join(lines)
    found = SENTENCE.match(text)
    return found[1] if found else text


def _entry(name: str, text: str, *, wide: bool = False) -> list[str]:
    """A name and its text, wrapped; a wide name stands on a line of its own."""
    indent = " " * (8 if wide else 23)
    first = f"    {name}" if wide else f"    {name:<18} "
    if not wide and len(first) <= len(indent):
        return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=indent) or [first]
    return [first, *textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)]

"""Names to classes, loaded when first asked for, with errors that help."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import fields
from importlib import import_module


class Registry:
    """A table of names whose entries are ``"module:Class"``, imported on use.

    Args:
        kind: what the entries are, for error messages ("method").
        entries: name to ``"module:Class"``.
    """

    def __init__(self, kind: str, entries: dict[str, str]) -> None:
        self.kind = kind
        self._entries = entries

    @property
    def names(self) -> list[str]:
        """Valid names, sorted."""
        return sorted(self._entries)

    def __iter__(self) -> Iterator[str]:
        """The names in the order of their lines; ``names`` has them sorted."""
        return iter(list(self._entries))

    def register(self, name: str, entry: str) -> None:
        """Add an entry in this process, such as a class of a notebook: ``"__main__:MyClass"``.

        Raises:
            ValueError: the name is taken by something else, or the entry has no colon.
        """
        if not all(entry.partition(":")):
            raise ValueError(f'expected "module:Class" for {self.kind} {name!r}, got {entry!r}')
        if self._entries.get(name, entry) != entry:
            raise ValueError(
                f"{self.kind} {name!r} is {self._entries[name]!r} already; choose another name"
            )
        self._entries[name] = entry

    def load(self, name: str) -> type:
        """The class of this name.

        Raises:
            ValueError: unknown name; the message lists the valid ones and the nearest.
        """
        if name not in self._entries:
            raise ValueError(unknown(self.kind, name, self.names))
        module, _, attribute = self._entries[name].partition(":")
        loaded: type = getattr(import_module(module), attribute)
        return loaded

    def name_of(self, loaded: type) -> str | None:
        """The name of a class; None if it is not registered."""
        entry = f"{loaded.__module__}:{loaded.__qualname__}"
        return next((name for name, value in self._entries.items() if value == entry), None)

    def build(self, name: str, params: dict[str, object]) -> object:
        """An instance of the class of this name, a dataclass, with these fields.

        Raises:
            ValueError: unknown name or parameter; the message names the nearest valid one.
        """
        loaded = self.load(name)
        valid = [field.name for field in fields(loaded) if field.init]
        for param in params:
            if param not in valid:
                raise ValueError(unknown(f"parameter of {self.kind} {name!r}:", param, valid))
        built: object = loaded(**params)
        return built


def unknown(kind: str, name: object, valid: Iterable[str]) -> str:
    """An error text for a wrong name: the valid ones, and the nearest if one is near."""
    valid = sorted(valid)
    near = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Valid: {', '.join(valid) or 'none'}"

"""Entries that a script or a notebook adds."""

import pytest

from pbs.registry import Registry


def test_an_entry_can_be_added_once():
    registry = Registry("part", {"a": "pbs.registry:Registry"})
    registry.register("b", "pbs.registry:Registry")
    registry.register("b", "pbs.registry:Registry")  # a notebook's cell runs again
    assert registry.load("b") is Registry
    assert registry.names == ["a", "b"]
    with pytest.raises(ValueError, match=r"'a' is 'pbs\.registry:Registry' already"):
        registry.register("a", "other:Class")
    for entry in ("no_colon", ":Class", "module:"):
        with pytest.raises(ValueError, match="module:Class"):
            registry.register("c", entry)

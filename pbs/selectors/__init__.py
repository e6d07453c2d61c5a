"""Block selectors: how likely each key block is to matter to each query block."""

from pbs.registry import Registry
from pbs.selectors.base import Selector
from pbs.selectors.top_p import select_top_p

SELECTORS = Registry(
    "selector",
    {
        "meanpool": "pbs.selectors.meanpool:MeanPoolSelector",
    },
)


def build_selector(name: str, params: dict[str, object]) -> Selector:
    """Make a selector by name; an unknown name or parameter raises ValueError, with the valid ones."""
    selector = SELECTORS.build(name, params)
    assert isinstance(selector, Selector)
    return selector


__all__ = ["SELECTORS", "Selector", "build_selector", "select_top_p"]

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

__all__ = ["SELECTORS", "Selector", "select_top_p"]

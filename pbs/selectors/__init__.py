"""Block selectors: how likely each key block is to matter to each query block."""

from pbs.registry import Registry
from pbs.selectors.base import Selector

SELECTORS = Registry(
    "selector",
    {
        "meanpool": "pbs.selectors.meanpool:MeanPoolSelector",
        "maxpool": "pbs.selectors.maxpool:MaxPoolSelector",
        "antidiagonal": "pbs.selectors.antidiagonal:AntidiagonalSelector",
        "low_band": "pbs.selectors.bands:LowBandSelector",
        "sampled": "pbs.selectors.sampled:SampledSelector",
        "oracle": "pbs.selectors.oracle:OracleSelector",
    },
)


def build_selector(name: str, params: dict[str, object]) -> Selector:
    """Make a selector; an unknown name or parameter raises ValueError with the valid ones."""
    selector = SELECTORS.build(name, params)
    assert isinstance(selector, Selector)
    return selector


__all__ = ["SELECTORS", "Selector", "build_selector"]

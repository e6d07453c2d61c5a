"""Methods by name."""

from __future__ import annotations

from pbs.methods.base import AttentionMethod
from pbs.registry import Registry

# One line per method. Classes are imported when asked for: `pbs` does not depend on `baselines`.
METHODS = Registry(
    "method",
    {
        "flash": "baselines.flash:FlashAttention",
        "meanpool": "baselines.meanpool:MeanPooling",
        "pbs": "pbs.methods.pbs:PBS",
        "pbs_plus": "pbs.methods.pbs_plus:PBSPlus",
        "xattention": "baselines.xattention:XAttention",
        "flexprefill": "baselines.flexprefill:FlexPrefill",
        "prism": "baselines.prism:Prism",
        "minference": "baselines.minference:MInference",
        "streaming": "baselines.streaming:StreamingLLM",
    },
)


def build_method(name: str, **params: object) -> AttentionMethod:
    """Make an attention method.

    Args:
        name: one of ``METHODS.names``.
        **params: the method's own parameters; defaults are those of its class.

    Returns:
        The method, callable as ``method(q, k, v)``.

    Raises:
        ValueError: unknown name or parameter (the message names the nearest valid one), or a value
            outside its range.
        TypeError: a value of the wrong type.
    """
    method = METHODS.build(name, params)
    assert isinstance(method, AttentionMethod)
    return method

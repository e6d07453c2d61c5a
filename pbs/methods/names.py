"""The table of methods."""

from __future__ import annotations

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
        "random_blocks": "baselines.random_blocks:RandomBlocks",
    },
)

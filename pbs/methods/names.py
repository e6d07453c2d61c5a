"""The table of methods."""

from __future__ import annotations

from pbs.registry import Registry

# One line per method, in the order of tables and legends. Classes are imported when asked for:
# `pbs` does not depend on `baselines`.
METHODS = Registry(
    "method",
    {
        "flash": "baselines.flash:FlashAttention",
        "pbs": "pbs.methods.pbs:PBS",
        "pbs_plus": "pbs.methods.pbs_plus:PBSPlus",
        "pbs_calibrated": "pbs.methods.pbs_calibrated:PBSCalibrated",
        "meanpool": "baselines.meanpool:MeanPooling",
        "minference": "baselines.minference:MInference",
        "xattention": "baselines.xattention:XAttention",
        "flexprefill": "baselines.flexprefill:FlexPrefill",
        "streaming": "baselines.streaming:StreamingLLM",
        "prism": "baselines.prism:Prism",
        "random_blocks": "baselines.random_blocks:RandomBlocks",
    },
)

"""Methods as the cost model counts them: their names there, and the parameters that matter.

Importable without hydra and wandb.
"""

from __future__ import annotations

from typing import Any

from experiments.timing.densities import ControlledDensity
from pbs.methods.base import AttentionMethod

# Class of a method to its name in the cost model.
COUNTED = {
    "FlashAttention": "flash",
    "PBS": "pbs",
    "PBSPlus": "pbs_plus",
    "MeanPooling": "meanpool",
    "XAttention": "xattention",
    "FlexPrefill": "flexprefill",
    "Prism": "prism",
    "MInference": "minference",
    "StreamingLLM": "streaming",
    "RandomBlocks": "random_blocks",
}


def counted_settings(method: AttentionMethod) -> dict[str, Any] | None:
    """Arguments of ``method_cost`` but the density, from a method's own parameters.

    None for a method without a count.
    """
    inner = method.method if isinstance(method, ControlledDensity) else method
    name = COUNTED.get(type(inner).__name__)
    if name is None:
        return None
    return {
        "method": name,
        "block_size": getattr(inner, "block_size", 128),
        "shared_order": getattr(inner, "gqa", "") == "shared",
        "stride": getattr(inner, "stride", 8),
    }


def least_density(method: AttentionMethod) -> float:
    """What is known of a method's density before it runs: its target, or nothing."""
    return method.target_density if isinstance(method, ControlledDensity) else 0.0

"""Methods as the cost model counts them: their names there, and the parameters that matter.

Importable without hydra and wandb.
"""

from __future__ import annotations

from typing import Any

from experiments.timing.densities import ControlledDensity
from pbs.methods import METHODS
from pbs.methods.base import AttentionMethod


def counted_settings(method: AttentionMethod) -> dict[str, Any] | None:
    """Arguments of ``method_cost`` but the density, from a method's own parameters.

    None for a method without a count.
    """
    inner = method.method if isinstance(method, ControlledDensity) else method
    name = METHODS.name_of(type(inner))
    if name is None or inner.facts is None:
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

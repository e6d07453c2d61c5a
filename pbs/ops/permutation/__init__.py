"""Which keys matter, their order inside segments, and tensors in that order."""

from pbs.ops.permutation.api import (
    gather_and_pool,
    gather_keys,
    importance_order,
    key_importance,
    sort_segments,
)

__all__ = [
    "gather_and_pool",
    "gather_keys",
    "importance_order",
    "key_importance",
    "sort_segments",
]

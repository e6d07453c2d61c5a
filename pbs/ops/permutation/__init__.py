"""Which keys matter, their order inside segments, and tensors in that order."""

from pbs.ops.permutation.api import gather_keys, key_importance, sort_segments

__all__ = ["gather_keys", "key_importance", "sort_segments"]

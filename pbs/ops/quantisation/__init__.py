"""Eight-bit copies of queries, keys and values, in the layouts that matrix units read."""

from pbs.ops.quantisation.api import (
    LARGEST,
    channel_scales,
    interleave,
    quantise_rows,
    quantise_values,
    rotation,
    rotation_size,
)

__all__ = [
    "LARGEST",
    "channel_scales",
    "interleave",
    "quantise_rows",
    "quantise_values",
    "rotation",
    "rotation_size",
]

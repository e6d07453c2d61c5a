"""Eight-bit copies of queries, keys and values, in the layouts that matrix units read."""

from pbs.ops.quantisation.api import (
    INTERLEAVED,
    LARGEST,
    interleave,
    quantise_rows,
    quantise_values,
    rotation,
    rotation_size,
)

__all__ = [
    "INTERLEAVED",
    "LARGEST",
    "interleave",
    "quantise_rows",
    "quantise_values",
    "rotation",
    "rotation_size",
]

"""Permuted block-sparse attention: methods, plans and kernels."""

from pbs.methods import AttentionMethod, CallRecord, build_method
from pbs.ops import AttentionPlan, Backend, BlockGrid, Geometry, block_sparse_attention

__all__ = [
    "AttentionMethod",
    "AttentionPlan",
    "Backend",
    "BlockGrid",
    "CallRecord",
    "Geometry",
    "block_sparse_attention",
    "build_method",
]

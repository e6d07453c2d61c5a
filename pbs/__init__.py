"""Permuted block-sparse attention: methods, plans and kernels."""

from pbs.methods import AttentionMethod, CallRecord, build_method
from pbs.ops import AttentionPlan, Backend, BlockGrid, Geometry, block_sparse_attention

__version__ = "0.1.0"

__all__ = [
    "AttentionMethod",
    "AttentionPlan",
    "Backend",
    "BlockGrid",
    "CallRecord",
    "Geometry",
    "__version__",
    "block_sparse_attention",
    "build_method",
]

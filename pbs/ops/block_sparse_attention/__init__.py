"""Attention over exactly the keys a plan names."""

from pbs.ops.block_sparse_attention.api import Backend, block_sparse_attention
from pbs.ops.block_sparse_attention.common import AS_GIVEN, FP8, PRECISIONS

__all__ = ["AS_GIVEN", "FP8", "PRECISIONS", "Backend", "block_sparse_attention"]

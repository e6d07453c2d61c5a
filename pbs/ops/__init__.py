"""Operators: plans, and the kernels that carry them out."""

from pbs.ops.block_sparse_attention import Backend, block_sparse_attention
from pbs.ops.grid import BlockGrid, Geometry
from pbs.ops.plan import AttentionPlan

__all__ = ["AttentionPlan", "Backend", "BlockGrid", "Geometry", "block_sparse_attention"]

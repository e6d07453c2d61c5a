"""Attention over exactly the keys a plan names."""

from pbs.ops.block_sparse_attention.api import Backend, block_sparse_attention

__all__ = ["Backend", "block_sparse_attention"]

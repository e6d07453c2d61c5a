"""Blocks as single vectors, and what their products say."""

from pbs.ops.pooling.api import block_logits, mean_pool, softmax_over

__all__ = ["block_logits", "mean_pool", "softmax_over"]

"""How much of a query's softmax each tile of keys holds."""

from pbs.ops.tile_logsumexp.api import tile_logsumexp

__all__ = ["tile_logsumexp"]

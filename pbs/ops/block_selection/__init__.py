"""Which key blocks a query block computes, as lists."""

from pbs.ops.block_selection.api import (
    list_blocks,
    select_pooled_blocks,
    select_top_p,
    select_top_p_blocks,
)

__all__ = ["list_blocks", "select_pooled_blocks", "select_top_p", "select_top_p_blocks"]

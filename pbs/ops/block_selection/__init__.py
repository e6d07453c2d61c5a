"""From block probabilities to lists of blocks."""

from pbs.ops.block_selection.api import list_blocks, select_top_p_blocks

__all__ = ["list_blocks", "select_top_p_blocks"]

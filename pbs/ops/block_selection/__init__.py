"""From block probabilities to lists of blocks."""

from pbs.ops.block_selection.api import select_top_p_blocks

__all__ = ["select_top_p_blocks"]

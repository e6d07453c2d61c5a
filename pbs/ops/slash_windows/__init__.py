"""Windows and columns of vertical-slash heads, tile by tile."""

from pbs.ops.slash_windows.api import columns_outside, walk_windows

__all__ = ["columns_outside", "walk_windows"]

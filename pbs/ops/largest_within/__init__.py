"""The largest entries of a row that together stay within a goal."""

from pbs.ops.largest_within.api import Border, largest_within

__all__ = ["Border", "largest_within"]

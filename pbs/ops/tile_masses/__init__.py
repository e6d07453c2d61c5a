"""Log-sums of a query tile's rows joined to the attention of its key tiles."""

from pbs.ops.tile_masses.api import tile_masses

__all__ = ["tile_masses"]

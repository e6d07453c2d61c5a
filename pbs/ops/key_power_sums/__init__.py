"""What queries want of each key, so that one that wants it much counts more than many a little."""

from pbs.ops.key_power_sums.api import key_power_sums

__all__ = ["key_power_sums"]

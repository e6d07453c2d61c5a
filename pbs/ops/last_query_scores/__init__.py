"""What the last queries pay to each key and to each offset."""

from pbs.ops.last_query_scores.api import last_query_scores

__all__ = ["last_query_scores"]

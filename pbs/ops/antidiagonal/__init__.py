"""Block sums of XAttention's antidiagonal scores."""

from pbs.ops.antidiagonal.api import antidiagonal_block_sums, query_groups
from pbs.ops.antidiagonal.own import own_logsumexp

__all__ = ["antidiagonal_block_sums", "own_logsumexp", "query_groups"]

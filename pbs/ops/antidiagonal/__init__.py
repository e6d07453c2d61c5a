"""Block sums of XAttention's antidiagonal scores."""

from pbs.ops.antidiagonal.api import antidiagonal_block_sums, query_groups

__all__ = ["antidiagonal_block_sums", "query_groups"]

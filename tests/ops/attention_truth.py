"""The truths that kernels are compared with."""

import torch


def exact_attention(q, k, v, mask, scale):
    """fp64 softmax over the pairs of a token mask; 0 for a query without keys."""
    return eager_attention(q.double(), k.double(), v.double(), mask, scale)


def eager_attention(q, k, v, mask, scale):
    """The readable computation in the inputs' own dtype: its error is the yardstick."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    logits = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
    return logits.softmax(dim=-1).masked_fill(~mask, 0.0) @ v


def causal_mask(num_queries, num_keys):
    """Bottom-right aligned."""
    ones = torch.ones(num_queries, num_keys, dtype=torch.bool)
    return ones.tril(num_keys - num_queries)

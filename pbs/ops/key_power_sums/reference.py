"""Eager PyTorch, some rows at a time. Legend: see :mod:`pbs.ops.grid`."""

from __future__ import annotations

import torch
from torch import Tensor

# Logits held at once: 2^22 fp32 values are 16 MB.
MAX_LOGITS = 1 << 22


def key_power_sums(
    rows: Tensor, keys: Tensor, ends: Tensor, *, scale: float, power: float
) -> Tensor:
    """See :func:`pbs.ops.key_power_sums.api.key_power_sums`."""
    batch, num_heads, num_rows, _ = rows.shape
    num_keys, groups = keys.shape[2], num_heads // keys.shape[1]
    sums = rows.new_full((batch, num_heads, num_keys), float("-inf"), dtype=torch.float32)
    places = torch.arange(num_keys, device=rows.device)
    chunk = max(1, MAX_LOGITS // (batch * groups * max(num_keys, 1)))
    for head in range(keys.shape[1]):
        heads = slice(head * groups, (head + 1) * groups)
        seen = keys[:, head, None].float().transpose(-1, -2)
        for first in range(0, num_rows, chunk):
            part = slice(first, first + chunk)
            logits = (rows[:, heads, part].float() @ seen).mul_(scale)
            hidden = places >= ends[part, None]
            logits.masked_fill_(hidden, float("-inf"))
            logits = logits.log_softmax(dim=-1).mul_(power)
            logits.masked_fill_(hidden, float("-inf"))  # rows that see no key, too
            sums[:, heads] = torch.logaddexp(sums[:, heads], logits.logsumexp(dim=2))
    return sums

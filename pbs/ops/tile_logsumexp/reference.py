"""Eager PyTorch, some rows at a time. Legend: see :mod:`pbs.ops.grid`."""

from __future__ import annotations

import torch
from torch import Tensor

# Logits held at once: 2^22 fp32 values are 16 MB.
MAX_LOGITS = 1 << 22


def tile_logsumexp(
    rows: Tensor,
    keys: Tensor,
    ends: Tensor,
    *,
    tile: int,
    scale: float,
    natural: Tensor | None,
    until: Tensor | None,
) -> Tensor:
    """See :func:`pbs.ops.tile_logsumexp.api.tile_logsumexp`."""
    sums = _sums(rows, keys, torch.zeros_like(ends), ends, tile=tile, scale=scale)
    if natural is None or until is None:
        return sums
    # A tile belongs to one of the two: the other says -inf.
    return torch.maximum(sums, _sums(rows, natural, ends, until, tile=tile, scale=scale))


def _sums(
    rows: Tensor, keys: Tensor, begins: Tensor, ends: Tensor, *, tile: int, scale: float
) -> Tensor:
    batch, num_heads, num_rows, _ = rows.shape
    num_tiles = -(-keys.shape[2] // tile)
    sums = rows.new_full(
        (batch, num_heads, num_rows, num_tiles), float("-inf"), dtype=torch.float32
    )
    groups = num_heads // keys.shape[1]
    for head in range(keys.shape[1]):
        heads = slice(head * groups, (head + 1) * groups)
        chunk = max(1, MAX_LOGITS // (batch * groups * keys.shape[2]))
        for first in range(0, num_rows, chunk):
            part = slice(first, first + chunk)
            low, high = begins[heads, part], ends[heads, part]
            start = int(low.min()) // tile
            stop = -(-int(high.max()) // tile)
            if start >= stop:
                continue
            seen = keys[:, head, None, start * tile : stop * tile].float()
            logits = (rows[:, heads, part].float() @ seen.transpose(-1, -2)).mul_(scale)
            places = torch.arange(start * tile, start * tile + seen.shape[2], device=rows.device)
            hidden = (places < low[..., None]) | (places >= high[..., None])
            logits.masked_fill_(hidden, float("-inf"))
            missing = (stop - start) * tile - seen.shape[2]
            logits = torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))
            sums[:, heads, part, start:stop] = logits.unflatten(-1, (-1, tile)).logsumexp(dim=-1)
    return sums

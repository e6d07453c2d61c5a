"""Vertical lines and slashes the slow way: one head, one tile, one event after the other."""

import torch

TILE = 64


def walk(columns, offsets, end, num_keys):
    """Windows and columns of the query tile whose last position is ``end - 1``.

    Columns ascend, offsets descend. A pointer runs over each: a column is judged as soon as the
    current range has passed it, else the next offset moves or extends the range.
    """
    offsets = [offset for offset in offsets if offset < end]
    range_end = max(end - offsets[0], TILE)
    range_start = range_end - TILE
    windows, kept, column, offset = [], [], 0, 1
    while True:
        if column < len(columns) and columns[column] < range_end:
            if columns[column] < range_start:
                kept.append(columns[column])
            column += 1
            continue
        if offset == len(offsets):
            windows += range(range_start, range_end, TILE)
            break
        crossing_end = max(end - offsets[offset], TILE)
        offset += 1
        if crossing_end > range_end + TILE:
            windows += range(range_start, range_end, TILE)
            range_start, range_end = crossing_end - TILE, crossing_end
        elif crossing_end > range_end:
            range_end += TILE
    return [start for start in windows if start < num_keys], kept


def executed_mask(columns, offsets, num_queries, num_keys):
    """Computed pairs, bool ``[Nq, Nk]``, and how many tiles that takes."""
    columns = sorted(columns)
    offsets = sorted(offsets, reverse=True)
    mask = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    shift = num_keys - num_queries
    tiles = 0
    for row in range(0, num_queries, TILE):
        rows = slice(row, row + TILE)
        windows, kept = walk(columns, offsets, row + shift + TILE, num_keys)
        for start in windows:
            mask[rows, start : start + TILE] = True
        mask[rows, kept] = True
        tiles += len(windows) + -(-len(kept) // TILE)
    causal = torch.ones_like(mask).tril(shift)
    return mask & causal, tiles


def last_query_scores(q, k, scale, last_q):
    """fp64 scores of every key and every offset, for one head: ``[Nk]`` each."""
    num_keys = k.shape[0]
    last_q = min(last_q, q.shape[0])
    vertical = torch.zeros(num_keys, dtype=torch.float64)
    slash = torch.zeros(num_keys, dtype=torch.float64)
    for position in range(num_keys - last_q, num_keys):
        query = q[position - num_keys].double()
        probabilities = (k[: position + 1].double() @ query * scale).softmax(0)
        vertical[: position + 1] += probabilities
        slash[: position + 1] += probabilities.flip(0)
    return vertical, slash


def largest(scores, count, forced):
    """Indices of the ``count`` largest, the first ``forced`` before all others."""
    scores = scores.clone()
    scores[:forced] = float("inf")
    return scores.sort(descending=True, stable=True).indices[:count].tolist()

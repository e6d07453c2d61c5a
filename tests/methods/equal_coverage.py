"""Density of methods at equal coverage, exact: how an order is judged."""

from dataclasses import dataclass

import numpy as np
import torch

from pbs import build_method

LEVELS = (0.9, 0.95, 0.975)
# From a few blocks a row to nearly all, closer together where coverage nears 1.
THRESHOLDS = (
    *(0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85),
    *(0.9, 0.925, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999),
)


@dataclass
class Sweep:
    """Coverage and density of a method over thresholds, ``[thresholds, heads]``."""

    coverage: np.ndarray
    density: np.ndarray

    def at(self, level):
        """Density at this coverage: per head, and of all heads with one threshold."""
        columns = zip(self.coverage.T, self.density.T, strict=True)
        heads = [_interpolate(level, *column) for column in columns]
        return np.mean(heads), _interpolate(level, self.coverage.mean(1), self.density.mean(1))


def _interpolate(level, coverage, density):
    return np.interp(level, np.maximum.accumulate(coverage), density)


def sweep(calls, **params):
    """Run a method that moves keys only over (q, k, scale) of one sequence each; heads add up."""
    parts = []
    for q, k, scale in calls:
        tiles = query_tile_masses(q, k, scale, params["block_size"])
        points = []
        for threshold in THRESHOLDS:
            plan = build_method("pbs", threshold=threshold, **params).plan(q, k, scale=scale)
            points.append([plan_coverage(tiles, plan, params["segment_size"]), plan.density()[0]])
        parts.append(torch.stack([torch.stack(point) for point in points]))
    coverage, density = torch.cat(parts, dim=2).unbind(1)
    return Sweep(coverage.numpy(), density.numpy())


def query_tile_masses(q, k, scale, block_size):
    """Dense attention of each query tile to each key, summed over its rows, ``[Hq, Tq, Nk]``."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    offset = k.shape[2] - q.shape[2]
    masses = []
    for start in range(0, q.shape[2], block_size):
        rows = q[0, :, start : start + block_size]
        positions = torch.arange(start, start + rows.shape[1])[:, None] + offset
        logits = rows @ k[0].transpose(-1, -2) * scale
        logits = logits.masked_fill(torch.arange(k.shape[2]) > positions, float("-inf"))
        masses.append(logits.softmax(-1).sum(1))
    return torch.stack(masses, dim=1)


def plan_coverage(tiles, plan, segment_size):
    """Mean over queries of the mass on computed pairs, ``[Hq]``; for plans of moved keys.

    What is missing is what lies in tiles of earlier segments that are not computed.
    """
    size = plan.grid.key_tile
    padding = plan.grid.num_key_tiles * size - plan.grid.num_keys
    moved = tiles.gather(-1, plan.key_order()[0, :, None].expand_as(tiles))
    blocks = torch.nn.functional.pad(moved, (0, padding)).unflatten(-1, (-1, size)).sum(-1)
    missing = plan.grid.past_tiles(segment_size=segment_size) & ~plan.block_mask()[0]
    return 1 - (blocks * missing).sum((-1, -2)) / plan.grid.num_queries

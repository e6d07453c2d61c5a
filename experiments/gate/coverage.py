"""Coverage: how much of dense attention's probability lies on the pairs a plan computes.

Exact, not estimated from blocks, and never N x N: query rows go in chunks. Legend: see
:mod:`pbs.ops.grid`; P plans, R rows of a chunk, L keys the chunk can see.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from experiments.gate.head_plan import HeadPlan
from pbs.methods.base import CallRecord
from pbs.ops.inputs import check_attention_inputs
from pbs.ops.plan import AttentionPlan

# Key under which calls are kept whose method was called without a layer.
UNNAMED_LAYER = -1


def measure_coverage(
    q: Tensor,
    k: Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    heads: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    chunk_rows: int = 256,
) -> Tensor:
    """Mean over queries of the dense attention probability on the pairs that the plan computes.

    Takes about ``chunk_rows * Nk * 8`` bytes besides a copy of one head's queries and keys.

    Args:
        q: ``[Z, Hq, Nq, D]``.
        k: ``[Z, Hkv, Nk, D]``; queries are the last Nq tokens.
        plan: what is computed, made for these shapes.
        scale: factor of the logits.
        heads: query heads to measure; default all.
        rows: query rows to average over, in [0, Nq); default all.
        chunk_rows: queries at a time.

    Returns:
        fp64 ``[Z, H']`` in [0, 1], one column per entry of ``heads``. A dense plan has 1 by
        definition, without a computation.

    Raises:
        ValueError: shapes that do not fit the plan, a head or row that does not exist, or a plan
            that names a pair twice.
    """
    return measure_plans(q, k, [plan], scale=scale, heads=heads, rows=rows, chunk_rows=chunk_rows)[
        0
    ]


def measure_plans(
    q: Tensor,
    k: Tensor,
    plans: Sequence[AttentionPlan],
    *,
    scale: float,
    heads: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    chunk_rows: int = 256,
) -> Tensor:
    """Coverage of several plans for the same queries and keys, which share the dense softmax.

    Arguments, memory and errors are those of :func:`measure_coverage`, for every plan; rows are
    taken in ascending order.

    Returns:
        fp64 ``[P, Z, H']`` in [0, 1].
    """
    each = measure_rows(q, k, plans, scale=scale, heads=heads, rows=rows, chunk_rows=chunk_rows)
    # Rounding of fp32 sums can carry full coverage a few 1e-7 past 1.
    return each.mean(dim=3).clamp_(max=1.0)


def measure_rows(
    q: Tensor,
    k: Tensor,
    plans: Sequence[AttentionPlan],
    *,
    scale: float,
    heads: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    chunk_rows: int = 256,
) -> Tensor:
    """Coverage of each query row; arguments and errors are those of :func:`measure_plans`.

    Returns:
        fp64 ``[P, Z, H', R]`` on the CPU, one column per row, ascending; rounding can carry a full
        one a few 1e-7 past 1.
    """
    check_attention_inputs(q, k)
    heads = range(q.shape[1]) if heads is None else heads
    for plan in plans:
        row_index = _checked_rows(q, k, plan, heads, rows, chunk_rows)
    groups = q.shape[1] // k.shape[1]
    shape = (len(plans), q.shape[0], len(heads), len(row_index))
    coverage = torch.ones(shape, dtype=torch.float64)
    sparse = [index for index, plan in enumerate(plans) if not plan.is_dense]
    if not sparse:
        return coverage
    for sequence in range(q.shape[0]):
        for column, head in enumerate(heads):
            per_row = _head_coverage(
                [HeadPlan.of(plans[index], sequence, head) for index in sparse],
                q[sequence, head],
                k[sequence, head // groups],
                scale=scale,
                rows=row_index,
                chunk_rows=chunk_rows,
            )
            coverage[sparse, sequence, column] = per_row.double().cpu()
    return coverage


class CoverageProbe:
    """A method's recorder that measures coverage and keeps only numbers.

    Set it as ``method.recorder`` and run the model. Decoding steps are left out, and
    calls that ran dense count as 1. Layers that the method is never called for (skipped by the
    patch, or special layers) do not appear.

    Args:
        layers: layers to measure; default all.
        heads: query heads to measure; default all.
        num_rows: measure about this many queries a call instead of all: the rows are cut into this
            many equal stretches and one of each is drawn, of the last stretch always the last row.
            Calls with equally many queries get equal rows, so that methods are compared on the
            same ones.
        seed: of that draw.
        chunk_rows: queries at a time, see :func:`measure_coverage`.

    Attributes:
        heads: query heads that are measured; None for all.
    """

    def __init__(
        self,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        num_rows: int | None = None,
        seed: int = 0,
        *,
        chunk_rows: int = 256,
    ) -> None:
        if num_rows is not None and num_rows < 1:
            raise ValueError(f"num_rows must be at least 1 or None for all rows, got {num_rows}")
        self._layers = None if layers is None else frozenset(layers)
        self.heads = None if heads is None else list(heads)
        self._num_rows = num_rows
        self._seed = seed
        self._chunk_rows = chunk_rows
        self._values: dict[int, list[Tensor]] = {}
        self._rows: list[tuple[Tensor, Tensor]] = []

    def __call__(self, record: CallRecord) -> None:
        """Measure one call."""
        layer = UNNAMED_LAYER if record.layer_idx is None else record.layer_idx
        num_queries = record.q.shape[2]
        is_decode = num_queries == 1 or record.is_decode
        if is_decode or (self._layers is not None and layer not in self._layers):
            return
        num_rows = self.num_rows_of(num_queries)
        rows = None
        if num_rows < num_queries:
            rows = sample_rows(num_queries, num_rows, seed=self._seed)
        with torch.no_grad():
            each = measure_rows(
                record.q,
                record.k,
                [record.plan],
                scale=record.scale,
                heads=self.heads,
                rows=rows,
                chunk_rows=self._chunk_rows,
            )[0]
        self._values.setdefault(layer, []).append(each.mean(dim=2).clamp_(max=1.0))
        places = torch.arange(num_queries) if rows is None else torch.tensor(rows)
        self._rows.append((places, each.float()))

    def num_rows_of(self, num_queries: int) -> int:
        """How many of so many queries are measured."""
        return num_queries if self._num_rows is None else min(self._num_rows, num_queries)

    def mean(self) -> float:
        """Mean over the layers of their means.

        Raises:
            ValueError: no call was measured.
        """
        layers = self.per_layer()
        return sum(layers.values()) / len(layers)

    def per_layer(self) -> dict[int, float]:
        """Mean over sequences and heads, by layer (-1: calls without a layer).

        Raises:
            ValueError: no call was measured.
        """
        return {layer: float(values.mean()) for layer, values in self.per_head().items()}

    def per_head(self) -> dict[int, Tensor]:
        """Coverage of every measured sequence and head, by layer: fp64 ``[sequences, H']``.

        Raises:
            ValueError: no call was measured.
        """
        if not self._values:
            raise ValueError(
                "no coverage was measured: expected at least one prefill call (two or more "
                "queries) of the layers asked for; is the probe the method's recorder?"
            )
        return {layer: torch.cat(values) for layer, values in sorted(self._values.items())}

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Coverage of all measured query rows between two places, over layers and heads: fp32.

        Raises:
            ValueError: no row there was measured.
        """
        found = [
            each[..., (places >= start) & (places < (places.max() + 1 if stop is None else stop))]
            for places, each in self._rows
        ]
        joined = torch.cat([one.flatten() for one in found]) if found else torch.empty(0)
        if not len(joined):
            raise ValueError(f"no coverage was measured of rows {start} to {stop}")
        return joined.clamp(max=1.0)

    def reset(self) -> None:
        """Forget everything measured so far."""
        self._values.clear()
        self._rows.clear()


def sample_rows(num_queries: int, num_rows: int, *, seed: int = 0) -> list[int]:
    """One row of each of ``num_rows`` equal stretches of the queries, ascending; the last always.

    Args:
        num_queries: Nq.
        num_rows: how many, from 1 to Nq.
        seed: of the draw.

    Raises:
        ValueError: ``num_rows`` outside [1, Nq].
    """
    if not 1 <= num_rows <= num_queries:
        raise ValueError(f"num_rows must lie in [1, {num_queries}], got {num_rows}")
    generator = torch.Generator().manual_seed(seed)
    edges = torch.arange(num_rows + 1) * num_queries // num_rows
    widths = edges[1:] - edges[:-1]
    draws = (torch.rand(num_rows, generator=generator) * widths).long()
    rows = edges[:-1] + draws.minimum(widths - 1)
    rows[-1] = num_queries - 1
    return rows.tolist()


def _head_coverage(
    plans: Sequence[HeadPlan],
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    rows: Tensor,
    chunk_rows: int,
) -> Tensor:
    """Coverage of each of the rows of one head, ``[P, rows]``, from q [Nq, D] and k [Nk, D]."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys_transposed = k.to(compute).T
    offset = plans[0].plan.grid.offset
    tilings = [(members, plans[members[0]].tiles_of(rows)) for members in _same_tiles(plans)]
    covered = torch.empty(len(plans), len(rows), dtype=compute, device=q.device)
    for start in range(0, len(rows), chunk_rows):
        chunk = slice(start, start + chunk_rows)
        positions = rows[chunk] + offset
        num_keys = int(positions.max()) + 1
        weights = (q[rows[chunk]].to(compute) * scale) @ keys_transposed[:, :num_keys]
        _softmax_causal_(weights, positions)
        for members, tiles in tilings:
            some = [plans[index] for index in members]
            for tile, part in _rows_by_tile(tiles[chunk]):
                masses = _tile_mass(some, tile, weights[part], positions[part])
                for index, mass in zip(members, masses, strict=True):
                    covered[index, chunk][part] = mass
    return covered


def _same_tiles(plans: Sequence[HeadPlan]) -> list[list[int]]:
    """The plans in groups that share the query tile of every row."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, plan in enumerate(plans):
        moved = -1 if plan.query_order is None else index
        groups[plan.plan.grid.query_tile, moved].append(index)
    return list(groups.values())


def _softmax_causal_(logits: Tensor, positions: Tensor) -> None:
    """Causal softmax over the keys, in place; row r sees the keys up to its position."""
    first = int(positions.min()) + 1
    future = torch.arange(first, logits.shape[1], device=logits.device) > positions[:, None]
    logits[:, first:].masked_fill_(future, float("-inf"))
    logits -= logits.amax(dim=1, keepdim=True)
    logits.exp_()
    logits /= logits.sum(dim=1, keepdim=True)


def _tile_mass(plans: Sequence[HeadPlan], tile: int, weights: Tensor, positions: Tensor) -> Tensor:
    """Probability on the computed pairs of rows of one tile, ``[P, R]`` from ``[R, L]``."""
    num_keys = weights.shape[1]
    counts = torch.stack([plan.key_counts(tile) for plan in plans])[:, :num_keys]
    is_repeated = bool((counts > 1).any())
    # The weights of future keys are 0, so that windows need no mask of their own...
    mass = counts.to(weights.dtype) @ weights.T
    for index, plan in enumerate(plans):
        if plan.local_window is None:
            continue
        # ...unless each row sees other keys of them.
        windowed = plan.window_keys(tile, num_keys)
        seen = plan.sees(positions, windowed)
        mass[index] += (weights[:, windowed] * seen).sum(dim=1)
        is_repeated |= windowed.unique().numel() < windowed.numel()
        is_repeated |= bool((seen & (counts[index, windowed] > 0)).any())
    if is_repeated:
        raise ValueError(
            f"inconsistent plan: a (query, key) pair of query tile {tile} is named more than once"
        )
    return mass


def _rows_by_tile(tiles: Tensor) -> Iterator[tuple[int, Tensor | slice]]:
    """Every tile and which rows are its own; stretches of equal tiles without a copy."""
    values, sizes = tiles.unique_consecutive(return_counts=True)
    if values.unique().numel() < values.numel():
        for tile in values.unique().tolist():
            yield tile, (tiles == tile).nonzero()[:, 0]
        return
    start = 0
    for tile, size in zip(values.tolist(), sizes.tolist(), strict=True):
        yield tile, slice(start, start + size)
        start += size


def _checked_rows(
    q: Tensor,
    k: Tensor,
    plan: AttentionPlan,
    heads: Sequence[int],
    rows: Sequence[int] | None,
    chunk_rows: int,
) -> Tensor:
    """The selected rows, after all arguments have been checked."""
    grid = plan.grid
    expected = (plan.batch_size, plan.num_heads, grid.num_queries, grid.num_keys)
    got = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if got != expected:
        raise ValueError(
            f"the plan is for (sequences, heads, queries, keys) = {expected}, the tensors have "
            f"{got}"
        )
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    for name, chosen, count in (("heads", heads, q.shape[1]), ("rows", rows, q.shape[2])):
        if chosen is not None and (len(chosen) == 0 or min(chosen) < 0 or max(chosen) >= count):
            raise ValueError(f"{name} must be one or more numbers in [0, {count}), got {chosen}")
    if rows is None:
        return torch.arange(grid.num_queries, device=q.device)
    # Neighbours share tiles and the number of keys they can see.
    return torch.as_tensor(rows, dtype=torch.long, device=q.device).sort().values

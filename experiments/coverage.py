"""Coverage: how much of dense attention's probability lies on the pairs a plan computes.

Exact, not estimated from blocks, and never N x N: query rows go in chunks. Legend: see
:mod:`pbs.ops.grid`; R rows of a chunk, L keys the chunk can see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
    check_attention_inputs(q, k)
    heads = range(q.shape[1]) if heads is None else heads
    row_index = _checked_rows(q, k, plan, heads, rows, chunk_rows)
    if plan.is_dense:
        return torch.ones(q.shape[0], len(heads), dtype=torch.float64)
    groups = q.shape[1] // k.shape[1]
    coverage = torch.empty(q.shape[0], len(heads), dtype=torch.float64)
    for sequence in range(q.shape[0]):
        for column, head in enumerate(heads):
            per_row = _head_coverage(
                _HeadPlan.of(plan, sequence, head),
                q[sequence, head],
                k[sequence, head // groups],
                scale=scale,
                rows=row_index,
                chunk_rows=chunk_rows,
            )
            coverage[sequence, column] = per_row.double().mean()
    # Rounding of fp32 sums can carry full coverage a few 1e-7 past 1.
    return coverage.clamp_(max=1.0)


class CoverageProbe:
    """A method's recorder that measures coverage and keeps only numbers.

    Set it as ``method.recorder`` and run the model. Decoding steps (one query) are left out, and
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
        self._heads = None if heads is None else tuple(heads)
        self._num_rows = num_rows
        self._seed = seed
        self._chunk_rows = chunk_rows
        self._values: dict[int, list[Tensor]] = {}

    def __call__(self, record: CallRecord) -> None:
        """Measure one call."""
        layer = UNNAMED_LAYER if record.layer_idx is None else record.layer_idx
        num_queries = record.q.shape[2]
        if num_queries == 1 or (self._layers is not None and layer not in self._layers):
            return
        rows = None
        if self._num_rows is not None and self._num_rows < num_queries:
            rows = sample_rows(num_queries, self._num_rows, seed=self._seed)
        with torch.no_grad():
            coverage = measure_coverage(
                record.q,
                record.k,
                record.plan,
                scale=record.scale,
                heads=self._heads,
                rows=rows,
                chunk_rows=self._chunk_rows,
            )
        self._values.setdefault(layer, []).append(coverage)

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

    def reset(self) -> None:
        """Forget everything measured so far."""
        self._values.clear()


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


@dataclass(frozen=True)
class _HeadPlan:
    """The lists of one head of one sequence, counts as Python numbers (one copy per head)."""

    plan: AttentionPlan
    blocks: Tensor  # [Tq, F]
    num_blocks: list[int]
    windows: Tensor  # [Tq, W]
    num_windows: list[int]
    columns: Tensor | None  # [Tq, C]
    num_columns: list[int]
    order: Tensor | None  # [Nk]
    query_order: Tensor | None  # [Nq]
    local_window: tuple[int, int] | None

    @classmethod
    def of(cls, plan: AttentionPlan, sequence: int, head: int) -> _HeadPlan:
        def pick(tensor: Tensor | None) -> Tensor | None:
            """This sequence and head, where one entry may stand for all or for a group."""
            if tensor is None:
                return None
            own = tensor[sequence if tensor.shape[0] > 1 else 0]
            return own[head // (plan.num_heads // own.shape[0])].long()

        columns, num_columns = pick(plan.columns), pick(plan.num_columns)
        local = None
        if plan.local_window is not None:
            num_init, num_local = plan.local_window[head].tolist()
            local = (num_init, num_local)
        return cls(
            plan,
            pick(plan.blocks),
            pick(plan.num_blocks).tolist(),
            pick(plan.windows),
            pick(plan.num_windows).tolist(),
            columns,
            [] if num_columns is None else num_columns.tolist(),
            pick(plan.order),
            pick(plan.query_order),
            local,
        )

    def whole_keys(self, tile: int) -> Tensor:
        """Keys that every query of the tile sees, original positions, int64."""
        width = self.plan.grid.key_tile
        starts = self.blocks[tile, : self.num_blocks[tile]] * width
        places = (starts[:, None] + torch.arange(width, device=starts.device)).flatten()
        keys = places if self.order is None else self.order[places]
        if self.columns is not None:
            keys = torch.cat([keys, self.columns[tile, : self.num_columns[tile]]])
        return keys

    def window_keys(self, tile: int, num_keys: int) -> Tensor:
        """Keys below ``num_keys`` in the tile's windows; which rows see them is up to each row."""
        width = self.plan.grid.key_tile
        starts = self.windows[tile, : self.num_windows[tile]]
        keys = (starts[:, None] + torch.arange(width, device=starts.device)).flatten()
        return keys[keys < num_keys]

    def sees(self, positions: Tensor, keys: Tensor) -> Tensor:
        """Causality and the token rule inside windows, bool ``[R, keys]``."""
        seen = keys <= positions[:, None]
        if self.local_window is not None:
            num_init, num_local = self.local_window
            seen &= (keys < num_init) | (positions[:, None] - keys < num_local)
        return seen

    def tiles_of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The rows sorted by their place in the plan, and the tile of each."""
        places = rows
        if self.query_order is not None:
            inverse = torch.empty_like(self.query_order)
            inverse[self.query_order] = torch.arange(len(inverse), device=inverse.device)
            places = inverse[rows]
        places, index = places.sort(stable=True)
        return rows[index], places // self.plan.grid.query_tile


def _head_coverage(
    head: _HeadPlan, q: Tensor, k: Tensor, *, scale: float, rows: Tensor, chunk_rows: int
) -> Tensor:
    """Coverage of each of the rows of one head, in plan order, from q [Nq, D] and k [Nk, D]."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys_transposed = k.to(compute).T
    rows, tiles = head.tiles_of(rows)
    covered = torch.empty(len(rows), dtype=compute, device=q.device)
    for start in range(0, len(rows), chunk_rows):
        chunk = slice(start, start + chunk_rows)
        positions = rows[chunk] + head.plan.grid.offset
        num_keys = int(positions.max()) + 1
        weights = (q[rows[chunk]].to(compute) * scale) @ keys_transposed[:, :num_keys]
        _softmax_causal_(weights, positions)
        for part, tile in _runs(tiles[chunk]):
            covered[chunk][part] = _tile_mass(head, tile, weights[part], positions[part])
    return covered


def _softmax_causal_(logits: Tensor, positions: Tensor) -> None:
    """Causal softmax over the keys, in place; row r sees the keys up to its position."""
    first = int(positions.min()) + 1
    future = torch.arange(first, logits.shape[1], device=logits.device) > positions[:, None]
    logits[:, first:].masked_fill_(future, float("-inf"))
    logits -= logits.amax(dim=1, keepdim=True)
    logits.exp_()
    logits /= logits.sum(dim=1, keepdim=True)


def _tile_mass(head: _HeadPlan, tile: int, weights: Tensor, positions: Tensor) -> Tensor:
    """Probability on the computed pairs of rows of one tile, ``[R]`` from ``[R, L]``."""
    whole = head.whole_keys(tile)
    counts = torch.zeros(head.plan.grid.num_keys, dtype=weights.dtype, device=weights.device)
    counts.index_add_(0, whole, counts.new_ones(len(whole)))
    windowed = head.window_keys(tile, weights.shape[1])
    seen = head.sees(positions, windowed)
    repeated = bool((counts > 1).any()) or windowed.unique().numel() < windowed.numel()
    if repeated or bool((seen & (counts[windowed] > 0)).any()):
        raise ValueError(
            f"inconsistent plan: a (query, key) pair of query tile {tile} is named more than once"
        )
    mass = weights @ counts[: weights.shape[1]]
    return mass + (weights[:, windowed] * seen).sum(dim=1)


def _runs(tiles: Tensor) -> Iterator[tuple[slice, int]]:
    """Stretches of equal tiles."""
    values, sizes = tiles.unique_consecutive(return_counts=True)
    start = 0
    for tile, size in zip(values.tolist(), sizes.tolist(), strict=True):
        yield slice(start, start + size), tile
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
    return torch.as_tensor(rows, dtype=torch.long, device=q.device)

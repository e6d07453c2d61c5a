"""Keys move only in the heads that gain: fewer blocks for the same attention mass.

Legend: see :mod:`pbs.ops.grid`; R sampled query rows, G query heads per key/value head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from pbs.checks import check_positive_int
from pbs.ops.grid import BlockGrid
from pbs.ops.permutation.reference import MAX_SCORES
from pbs.orders import build_order
from pbs.orders.base import Arrangement, Order

# Fractional parts of its multiples spread evenly over [0, 1): the golden ratio.
_GOLDEN = 0.6180339887498949


@dataclass(kw_only=True)
class AdaptiveOrder(Order):
    """Another order, kept in the heads where it saves blocks; in the others no key moves.

    The paper leaves this open: permuting gathers "vertical lines" into few blocks but smears
    "slash lines" over more. :meth:`choose` decides by what counts, blocks computed at equal true
    coverage: for some sampled query rows it measures the attention mass of every block, and walks
    through the blocks in the order in which a growing threshold would select them. At the method's
    threshold the natural arrangement covers some mass with so many blocks; how many does the
    permuted one need for the same mass? And how many does the natural one need for what the
    permuted one covers? Keys move where the permuted arrangement needs less in the geometric mean
    of the two answers.

    Costs 2 Hq R N D FLOP for the sampled rows, twice the paper's proxy at the defaults, and a
    second run of the selector. Nothing waits for the device. The decision follows the selector:
    one that sees slash lines (antidiagonal) lets more heads stay.

    Args:
        base: the order to keep or drop, one of ``pbs.orders.ORDERS`` that moves keys.
        base_params: fields of its class.
        num_rows: query rows measured (R), evenly spread; more cost more and decide more surely.

    Source: arXiv 2510.21270, section 5, future work.
    """

    is_adaptive = True

    base: str = "last_block"
    base_params: dict[str, Any] = field(default_factory=dict)
    num_rows: int = 256

    def __post_init__(self) -> None:
        if self.base in ("adaptive", "none"):
            raise ValueError(
                f"base must be an order that moves keys, got {self.base!r}; try 'last_block'"
            )
        check_positive_int(self.num_rows, name="num_rows")
        self._base = build_order(self.base, self.base_params)

    def compute(
        self,
        q: Tensor,
        k: Tensor,
        *,
        scale: float,
        block_size: int,
        segment_size: int,
        shared: bool,
    ) -> Tensor | None:
        """The base order in every head; see the base class."""
        return self._base.compute(
            q,
            k,
            scale=scale,
            block_size=block_size,
            segment_size=segment_size,
            shared=shared,
        )

    @override
    def choose(
        self,
        q: Tensor,
        k: Tensor,
        natural: Arrangement,
        permuted: Arrangement,
        *,
        scale: float,
        grid: BlockGrid,
        candidates: Tensor,
        threshold: float,
        query_order: Tensor | None = None,
    ) -> Tensor:
        """See the base class."""
        assert permuted.order is not None
        rows = sample_rows(grid.num_queries, self.num_rows, device=q.device)
        places = rows if query_order is None else query_order[:, :, rows]
        positions = (places + grid.offset).expand(*q.shape[:2], -1)
        counts = []
        for head in range(k.shape[1]):
            group = _Group.of(head, q, k, permuted)
            masses = group.block_masses(rows, positions, scale=scale, grid=grid)
            tiles = rows // grid.query_tile
            credits = [
                None if x.covered is None else group.pick(x.covered)[:, :, tiles]
                for x in (natural, permuted)
            ]
            walks = [
                _walk(
                    group.pick(arrangement.probabilities)[:, :, tiles],
                    group.pick(arrangement.forced),
                    mass,
                    candidates[tiles],
                    covered,
                )
                for arrangement, mass, covered in zip(
                    (natural, permuted), masses, credits, strict=True
                )
            ]
            counts.append(_blocks_needed(*walks, threshold=threshold))
        # [4, Z, Hq] -> [4, Z, Ho]: heads with a common order decide together.
        needed = torch.cat(counts, dim=-1).unflatten(-1, (permuted.order.shape[1], -1)).sum(-1)
        gains = needed[1] * needed[3] < needed[0] * needed[2]
        identity = torch.arange(grid.num_keys, device=q.device)
        return torch.where(gains.unsqueeze(-1), permuted.order, identity)


def sample_rows(num_queries: int, num_rows: int, *, device: torch.device | str = "cpu") -> Tensor:
    """One row of each of ``num_rows`` equal stretches of the queries, ascending int64 ``[R]``.

    Deterministic, and without a fixed place inside the query blocks; all rows if there are fewer.
    """
    num_rows = min(num_rows, num_queries)
    stretches = torch.arange(num_rows, dtype=torch.float64, device=device)
    rows = (stretches + stretches * _GOLDEN % 1.0) * (num_queries / num_rows)
    return rows.long().clamp(max=num_queries - 1)


@dataclass(frozen=True)
class _Group:
    """The query heads of one key/value head."""

    heads: slice
    queries: Tensor  # [Z, G, Nq, D]
    keys: Tensor  # [Z, Nk, D]
    order: Tensor  # [Z, 1 or G, Nk]

    @classmethod
    def of(cls, head: int, q: Tensor, k: Tensor, permuted: Arrangement) -> _Group:
        assert permuted.order is not None
        groups = q.shape[1] // k.shape[1]
        per_order = permuted.order.shape[1] // k.shape[1]
        heads = slice(head * groups, (head + 1) * groups)
        order = permuted.order[:, head * per_order : (head + 1) * per_order]
        return cls(heads, q[:, heads], k[:, head], order)

    def pick(self, x: Tensor) -> Tensor:
        """These heads of ``[.., Hq, ..]``; size 1 stands for all."""
        return x if x.shape[1] == 1 else x[:, self.heads]

    def block_masses(
        self, rows: Tensor, positions: Tensor, *, scale: float, grid: BlockGrid
    ) -> tuple[Tensor, Tensor]:
        """Attention mass of each block in natural and in permuted order, ``[Z, G, R, Tk]`` each."""
        batch, groups = self.queries.shape[:2]
        keys = self.keys.float().transpose(-1, -2)
        positions = positions[:, self.heads, :, None]
        tokens = torch.arange(grid.num_keys, device=keys.device)
        # Two tensors of scores live at a time.
        chunk = max(1, MAX_SCORES // (2 * batch * groups * grid.num_keys))
        masses = []
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            queries = self.queries[:, :, rows[part]].float()
            weights = (queries.flatten(1, 2) @ keys).unflatten(1, queries.shape[1:3]).mul_(scale)
            weights = weights.masked_fill_(tokens > positions[:, :, part], float("-inf"))
            weights = weights.softmax(dim=-1)
            natural = _tile_sums(weights, grid.key_tile)
            weights = weights.gather(-1, self.order.unsqueeze(2).expand_as(weights))
            masses.append((natural, _tile_sums(weights, grid.key_tile)))
        first, second = (torch.cat(parts, dim=2) for parts in zip(*masses, strict=True))
        return first, second


def _tile_sums(weights: Tensor, tile: int) -> Tensor:
    """Sum of each tile of keys, ``[.., Tk]`` from ``[.., Nk]``."""
    whole = weights.shape[-1] // tile * tile
    sums = weights[..., :whole].unflatten(-1, (-1, tile)).sum(dim=-1)
    if whole < weights.shape[-1]:
        sums = torch.cat([sums, weights[..., whole:].sum(dim=-1, keepdim=True)], dim=-1)
    return sums


def _walk(
    probabilities: Tensor,
    forced: Tensor,
    mass: Tensor,
    candidates: Tensor,
    covered: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What a growing threshold selects, over all rows of a head.

    Args:
        probabilities: of the rows' blocks, ``[Z, G, R, Tk]``.
        forced: ``[.., .., 1, Tk]``; such blocks come first.
        mass: true attention mass of the blocks, ``[Z, G, R, Tk]``.
        candidates: bool ``[R, Tk]``.
        covered: ``[Z, G, R]``, or None; see :class:`Arrangement`.

    Returns:
        The threshold above which each (row, block) is selected, ascending ``[Z, G, R Tk]``
        (infinite for what is no candidate), and the mean mass covered once it is, fp64, including
        the keys that are no candidates: those are always computed.
    """
    if covered is not None:
        free = probabilities.masked_fill(~(forced & candidates), 0.0)
        covered = (covered + free.sum(dim=-1)).unsqueeze(-1)
        probabilities = probabilities - free
    ranked, index = probabilities.sort(dim=-1, descending=True, stable=True)
    entry = pad(ranked.cumsum(dim=-1)[..., :-1], (1, 0))
    if covered is not None:
        entry = entry + covered
    entry = entry.masked_fill(forced.expand_as(mass).gather(-1, index), -1.0)
    selectable = candidates.expand_as(mass)
    entry = entry.masked_fill(~selectable.gather(-1, index), float("inf"))
    gained = mass.masked_fill(~selectable, 0.0).gather(-1, index).flatten(2)
    entry, order = entry.flatten(2).sort(dim=-1, stable=True)
    covered = gained.gather(-1, order).double().cumsum(dim=-1)
    missing = mass.shape[2] - covered[..., -1:]
    return entry, (covered + missing) / mass.shape[2]


def _blocks_needed(
    natural: tuple[Tensor, Tensor], permuted: tuple[Tensor, Tensor], *, threshold: float
) -> Tensor:
    """Sampled blocks at equal coverage, fp64 ``[4, Z, G]``.

    Natural and permuted, for the mass that the natural arrangement covers at the threshold; then
    natural and permuted, for the mass that the permuted one covers.
    """

    def selected(walk: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        count = (walk[0] < threshold).sum(dim=-1, keepdim=True)
        return count, walk[1].gather(-1, (count - 1).clamp(min=0))

    def needed(walk: tuple[Tensor, Tensor], coverage: Tensor) -> Tensor:
        return (walk[1] < coverage).sum(dim=-1, keepdim=True) + 1

    count_natural, coverage_natural = selected(natural)
    count_permuted, coverage_permuted = selected(permuted)
    counts = [
        count_natural,
        needed(permuted, coverage_natural),
        needed(natural, coverage_permuted),
        count_permuted,
    ]
    return torch.stack(counts).squeeze(-1).double()

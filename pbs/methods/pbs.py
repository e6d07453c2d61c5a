"""PBS-Attn: an order of the keys and a selector of blocks. Legend: see :mod:`pbs.ops.grid`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from pbs.checks import (
    check_block_size,
    check_choice,
    check_integer,
    check_segment_size,
    check_threshold,
)
from pbs.methods.base import AttentionMethod, Call, Knob
from pbs.methods.facts import Facts, at
from pbs.ops.grid import BlockGrid, candidate_tiles
from pbs.ops.permutation import gather_keys
from pbs.ops.plan import AttentionPlan, own_tiles
from pbs.ops.stages import stage
from pbs.orders import build_order
from pbs.orders.base import Arrangement, sink_first
from pbs.orders.queries import gather_queries, order_queries
from pbs.selectors import SELECTORS, build_selector
from pbs.selectors.own import OwnKeys

TARGETS = ("keys", "queries", "keys_then_queries", "queries_then_keys")


@dataclass(kw_only=True)
class PBS(AttentionMethod):
    """Permuted block-sparse attention.

    Keys are reordered inside segments so that important ones share blocks; then the fewest blocks
    of earlier segments that reach the threshold are computed, and the query's own segment whole.

    Args:
        block_size: tokens per tile side (B), a power of two of at least 16.
        segment_size: tokens that may be permuted among themselves (S), a multiple of B. Prompts of
            at most S tokens run dense, without ``local_blocks``.
        threshold: cumulative block probability to reach (τ), in (0, 1]; larger computes more, 1
            equals dense attention. Of the candidate blocks alone, so no coverage, unless the
            selector credits what is computed anyway (antidiagonal and oracle do, if asked to).
        order: how keys move within segments, one of ``pbs.orders.ORDERS``.
        selector: how blocks are scored, one of ``pbs.selectors.SELECTORS``.
        target: what moves. "keys" (the paper's choice), by ``order``. "queries": in chunks of S
            rows, to queries that resemble the same key block; no key moves, whatever the order.
            "keys_then_queries": queries resemble blocks of keys that have moved already.
            "queries_then_keys": queries resemble blocks in natural order, and an order with
            proxies takes them from the moved queries: the last B rows are then those of the last
            chunk that resemble its latest blocks, a greedy block's centroid is that of its moved
            queries, and random proxies are other rows; the average query stays what it was.
            Where queries move, a tile computes its whole chunk's segment, also its future part,
            so that density can exceed 1 when everything is selected.
        gqa: "per_query_head" (the paper's default) or "shared": one order per key/value head, from
            the queries averaged over the group, a Hkv/Hq-th of the memory.
        local_blocks: None (the paper): a query computes its own segment whole. A count: so many
            blocks before its own, as far as they lie in its segment; the others there are chosen
            like those of earlier segments, in natural order, so that long segments cost no more
            than short ones. Token 0 then stands first in every order. Needs target "keys".
        force_select_first_block: always compute the block that holds token 0, the attention sink.
        pad_mean: for pooling selectors: mean of a partial last query block over its "real" tokens,
            or zero-padded as in the original code ("reference").
        order_params: fields of the order's class, for orders that have any.
        selector_params: fields of the selector's class, for selectors that have any.

    Source: arXiv 2510.21270 (v2), Algorithms 1 and 2.
    """

    knob = Knob("threshold", low=0.001, high=1.0)
    facts = Facts(
        "PBS",
        "#D55E00",
        "o",
        selection="pooled",
        moves_keys=True,
        curve=at("threshold", 0.5, 0.7, 0.9),
    )

    block_size: int = 128
    segment_size: int = 256
    threshold: float = 0.9
    order: str = "last_block"
    selector: str = "meanpool"
    target: str = "keys"
    gqa: str = "per_query_head"
    local_blocks: int | None = None
    force_select_first_block: bool = True
    pad_mean: str = "real"
    order_params: dict[str, Any] = field(default_factory=dict)
    selector_params: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block_size(self.block_size)
        check_segment_size(self.segment_size, self.block_size)
        check_threshold(self.threshold)
        check_choice(self.gqa, ("per_query_head", "shared"), name="gqa")
        check_choice(self.target, TARGETS, name="target")
        check_choice(self.pad_mean, ("real", "reference"), name="pad_mean")
        if self.local_blocks is not None:
            check_integer(self.local_blocks, name="local_blocks", smallest=0)
            if self.target != "keys":
                raise ValueError(
                    f"local_blocks={self.local_blocks} needs target='keys', got {self.target!r}: "
                    "where queries move, a tile's own segment has no natural order to choose from"
                )
        self._order = build_order(self.order, self.order_params)
        self._selector = build_selector(self.selector, self._selector_settings())

    def _selector_settings(self) -> dict[str, Any]:
        """Fields of the selector's class; ``pad_mean`` is for those that have it."""
        known = {parameter.name for parameter in fields(SELECTORS.load(self.selector))}
        shared = {"pad_mean": self.pad_mean} if "pad_mean" in known else {}
        return shared | self.selector_params

    def select(self, call: Call) -> AttentionPlan:
        """See the base class. Steps as in Algorithm 1: order, scores, selection, forced blocks."""
        q, k, scale = call.q, call.k, call.scale
        grid = call.grid(self.block_size)
        reason = self._reason_nothing_is_left_out(grid.num_keys)
        if reason:
            return call.dense(reason, tile=self.block_size)
        candidates, num_candidates = candidate_tiles(
            grid,
            q.device,
            segment_size=self.segment_size,
            query_segment=self._query_segment,
        )
        query_order = ordered = k_means = None
        if self.target in ("queries", "queries_then_keys"):
            q, query_order = self._move_queries(q, k, candidates)
        with stage("order"):
            order = self._order_keys(q, k, scale)
            if order is not None and self._order.is_adaptive:
                order = self._adapt(q, k, order, scale, grid, candidates, query_order)
            if order is not None and self.local_blocks is not None:
                order = sink_first(order, self.segment_size)
        if order is not None:
            with stage("gather"):
                ordered, k_means = self._selector.gather(k, order, tile=self.block_size)
        keys = k if ordered is None else ordered
        if self.target == "keys_then_queries":
            q, query_order = self._move_queries(q, keys, candidates)
        if self.local_blocks is None:
            own, limits = self._own_keys(k, grid, query_order), num_candidates
        else:
            own = replace(OwnKeys.of(k, grid, segment_size=0), num_moved=num_candidates)
            candidates, num_candidates = candidate_tiles(grid, q.device)
            sizes = {"segment_size": self.segment_size, "local_tiles": self.local_blocks}
            limits = own_tiles(grid, q.device, **sizes).limits
        with stage("selection"):
            blocks, num_blocks = self._selector.select(
                q,
                keys,
                scale=scale,
                grid=grid,
                candidates=candidates,
                num_candidates=num_candidates,
                limits=limits,
                threshold=self.threshold,
                forced=self._first_block(order, q) if self.force_select_first_block else None,
                own=own,
                k_means=k_means,
            )
        return AttentionPlan.from_lists(
            blocks,
            num_blocks,
            grid,
            segment_size=self.segment_size,
            order=order,
            ordered_keys=ordered,
            query_order=query_order,
            local_tiles=self.local_blocks,
        )

    def _reason_nothing_is_left_out(self, num_keys: int) -> str:
        """Why a call with so few keys computes all of them; "" if it may not."""
        if self.local_blocks is None:
            few = num_keys <= self.segment_size
            return f"no more keys than segment_size={self.segment_size}" if few else ""
        few = num_keys <= (self.local_blocks + 1) * self.block_size
        return (
            f"no more keys than {self.local_blocks + 1} blocks of {self.block_size}" if few else ""
        )

    @property
    def _query_segment(self) -> int:
        """How many rows queries move among; 0 if they stay."""
        return 0 if self.target == "keys" else self.segment_size

    def _order_keys(self, q: Tensor, k: Tensor, scale: float) -> Tensor | None:
        """Original position of the key at each place, ``[Z, Ho, Nk]``; None if no key moves."""
        if self.target == "queries":
            return None
        return self._order.compute(
            q,
            k,
            scale=scale,
            block_size=self.block_size,
            segment_size=self.segment_size,
            shared=self.gqa == "shared",
        )

    def _adapt(
        self,
        q: Tensor,
        k: Tensor,
        order: Tensor,
        scale: float,
        grid: BlockGrid,
        candidates: Tensor,
        query_order: Tensor | None,
    ) -> Tensor:
        """The order in the heads that gain by it, natural order in the others, ``[Z, Ho, Nk]``."""
        own = self._own_keys(k, grid, query_order)
        arrangements = []
        for keys, key_order in ((k, None), (gather_keys(k, order), order)):
            probabilities, covered = self._selector.block_scores(
                q, keys, scale=scale, grid=grid, candidates=candidates, own=own
            )
            forced = self._forced_blocks(key_order, grid, q)
            arrangements.append(Arrangement(key_order, probabilities, forced, covered))
        return self._order.choose(
            q,
            k,
            *arrangements,
            scale=scale,
            grid=grid,
            candidates=candidates,
            threshold=self.threshold,
            query_order=query_order,
        )

    def _own_keys(self, k: Tensor, grid: BlockGrid, query_order: Tensor | None) -> OwnKeys:
        """What each query computes whatever is selected: its segment up to its position."""
        return OwnKeys.of(
            k,
            grid,
            segment_size=self.segment_size,
            query_segment=self._query_segment,
            query_order=query_order,
        )

    def _move_queries(self, q: Tensor, k: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """The queries in their new order, and the original row at each place, ``[Z, Hq, Nq]``."""
        with stage("order"):
            query_order = order_queries(
                q,
                k,
                candidates=candidates,
                block_size=self.block_size,
                segment_size=self.segment_size,
            )
        with stage("gather"):
            return gather_queries(q, query_order), query_order

    def _forced_blocks(self, order: Tensor | None, grid: BlockGrid, q: Tensor) -> Tensor:
        """The block that holds token 0, or none, bool ``[1 or Z, 1 or Hq, 1, Tk]``."""
        tiles = torch.arange(grid.num_key_tiles, device=q.device)
        if not self.force_select_first_block:
            return torch.zeros_like(tiles, dtype=torch.bool)[None, None, None]
        first = self._first_block(order, q)
        first = first.repeat_interleave(q.shape[1] // first.shape[1], dim=1)
        return tiles == first[..., None, None]

    def _first_block(self, order: Tensor | None, q: Tensor) -> Tensor:
        """The block that holds token 0, int64 ``[1 or Z, 1 or Ho]``."""
        if order is None:
            return torch.zeros(1, 1, dtype=torch.int64, device=q.device)
        # Token 0 never leaves its segment, the first.
        return order[..., : self.segment_size].argmin(dim=-1) // self.block_size

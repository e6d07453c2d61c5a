"""PBS-Attn: an order of the keys and a selector of blocks. Legend: see :mod:`pbs.ops.grid`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pbs.checks import (
    check_block_size,
    check_choice,
    check_segment_size,
    check_threshold,
)
from pbs.methods.base import AttentionMethod
from pbs.ops.gather import gather_keys
from pbs.ops.grid import BlockGrid
from pbs.ops.inputs import check_attention_inputs
from pbs.ops.plan import AttentionPlan
from pbs.orders import build_order
from pbs.selectors import build_selector, select_top_p


@dataclass(kw_only=True)
class PBS(AttentionMethod):
    """Permuted block-sparse attention.

    Keys are reordered inside segments so that important ones share blocks; then the fewest blocks
    of earlier segments that reach the threshold are computed, and the query's own segment whole.

    Args:
        block_size: tokens per tile side (B), a power of two of at least 16.
        segment_size: tokens that may be permuted among themselves (S), a multiple of B. Prompts of
            at most S tokens run dense.
        threshold: cumulative block probability to reach (τ), in (0, 1]; larger computes more, 1
            equals dense attention.
        order: how keys move within segments, one of ``pbs.orders.ORDERS``.
        selector: how blocks are scored, one of ``pbs.selectors.SELECTORS``.
        gqa: "per_query_head" (the paper's default) or "shared": one order per key/value head, from
            the queries averaged over the group, a Hkv/Hq-th of the memory.
        force_select_first_block: always compute the block that holds token 0, the attention sink.
        pad_mean: for pooling selectors: mean of a partial last query block over its "real" tokens,
            or zero-padded as in the original code ("reference").
        order_params: fields of the order's class, for orders that have any.
        selector_params: fields of the selector's class, for selectors that have any.

    Source: arXiv 2510.21270 (v2), Algorithms 1 and 2.
    """

    block_size: int = 128
    segment_size: int = 256
    threshold: float = 0.9
    order: str = "last_block"
    selector: str = "meanpool"
    gqa: str = "per_query_head"
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
        check_choice(self.pad_mean, ("real", "reference"), name="pad_mean")
        self._order = build_order(self.order, self.order_params)
        params = dict(self.selector_params)
        if self.selector == "meanpool":
            params.setdefault("pad_mean", self.pad_mean)
        self._selector = build_selector(self.selector, params)

    def plan(
        self,
        q: Tensor,
        k: Tensor,
        *,
        scale: float | None = None,
        layer_idx: int | None = None,  # noqa: ARG002 - the same in every layer
    ) -> AttentionPlan:
        """See the base class. Steps as in Algorithm 1: order, scores, selection, forced blocks."""
        check_attention_inputs(q, k)
        scale = q.shape[3] ** -0.5 if scale is None else scale
        grid = BlockGrid(q.shape[2], k.shape[2], self.block_size, self.block_size)
        if grid.num_keys <= self.segment_size:
            return AttentionPlan.dense(
                grid,
                q.shape[0],
                q.shape[1],
                device=q.device,
                reason=f"no more keys than segment_size={self.segment_size}",
            )
        order = self._order.compute(
            q,
            k,
            scale=scale,
            block_size=self.block_size,
            segment_size=self.segment_size,
            shared=self.gqa == "shared",
        )
        candidates = grid.past_tiles(q.device, segment_size=self.segment_size)
        ordered = None if order is None else gather_keys(k, order)
        probabilities = self._selector.block_probabilities(
            q,
            k if ordered is None else ordered,
            scale=scale,
            grid=grid,
            candidates=candidates,
        )
        mask = select_top_p(probabilities, threshold=self.threshold, candidates=candidates)
        if self.force_select_first_block:
            mask = mask | self._sink_block(order, grid, q)
        return AttentionPlan.from_block_mask(
            mask, grid, segment_size=self.segment_size, order=order, ordered_keys=ordered
        )

    def _sink_block(self, order: Tensor | None, grid: BlockGrid, q: Tensor) -> Tensor:
        """The block that holds token 0, bool ``[1 or Z, 1 or Hq, 1, Tk]``."""
        tiles = torch.arange(grid.num_key_tiles, device=q.device)
        if order is None:
            return (tiles == 0)[None, None, None]
        block = (order == 0).int().argmax(dim=-1) // self.block_size
        block = block.repeat_interleave(q.shape[1] // block.shape[1], dim=1)
        return tiles == block[..., None, None]

"""What a key order is, and the orders that sort keys by importance.

Legend: see :mod:`pbs.ops.grid`; P proxy queries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pbs.ops.grid import BlockGrid
from pbs.ops.permutation import importance_order


@dataclass(frozen=True)
class Arrangement:
    """Keys in one order, and what the selector says about the blocks they then form.

    Attributes:
        order: original position of the key at each place, int64 ``[Z, Ho, Nk]``; None: natural.
        probabilities: the selector's, fp32 ``[Z, Hq, Tq, Tk]``.
        forced: blocks computed whatever the selector says, bool ``[1 or Z, 1 or Hq, 1, Tk]``.
        covered: what counts towards the threshold before any block does, fp32 ``[Z, Hq, Tq]``; None
            where a forced block does not count either.
    """

    order: Tensor | None
    probabilities: Tensor
    forced: Tensor
    covered: Tensor | None = None


class Order(ABC):
    """A permutation of the keys inside each complete segment.

    ``is_adaptive``: whether :meth:`choose` has a say once the keys are in this order.
    """

    is_adaptive: ClassVar[bool] = False

    @abstractmethod
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
        """Where the keys go.

        Args:
            q: ``[Z, Hq, Nq, D]``.
            k: ``[Z, Hkv, Nk, D]``.
            scale: factor of the logits.
            block_size: B.
            segment_size: S, a multiple of B.
            shared: one order per key/value head instead of one per query head.

        Returns:
            Original position of the key at each place, int64 ``[Z, Ho, Nk]`` with Ho = Hkv if
            ``shared`` else Hq; the incomplete last segment keeps its order. None: no key moves.
        """

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
        """The permuted order in the heads that gain, natural order in the others.

        Args:
            q: ``[Z, Hq, Nq, D]`` in plan order.
            k: ``[Z, Hkv, Nk, D]`` in natural order.
            natural: no key moved.
            permuted: keys in the base order.
            scale: factor of the logits.
            grid: the blocks.
            candidates: blocks that may be selected, bool ``[Tq, Tk]``.
            threshold: cumulative block probability that the method will select (τ).
            query_order: original row of the query at each place, int64 ``[Z, Hq, Nq]``; None if no
                query moved.

        Returns:
            int64 ``[Z, Ho, Nk]``, the identity in the heads that do not gain.
        """
        raise NotImplementedError(f"{type(self).__name__} moves keys in every head")


class ImportanceOrder(Order):
    """Sorts each segment by the attention its keys get from a few proxy queries, highest first.

    Source: arXiv 2510.21270, section 3.2 and Algorithm 1. The proxy softmax runs over all complete
    segments without a causal mask: it is a score, not attention.
    """

    @abstractmethod
    def proxy_queries(self, q: Tensor, *, block_size: int) -> Tensor:
        """The queries that vote, ``[Z, Hq, P, D]``; means in fp32, rows of q in its dtype."""

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
        """See the base class."""
        if k.shape[2] < segment_size:
            return None
        proxy = self.proxy_queries(q, block_size=block_size)
        if shared:
            groups = q.shape[1] // k.shape[1]
            proxy = proxy.unflatten(1, (k.shape[1], groups)).mean(dim=2, dtype=torch.float32)
        return importance_order(proxy, k, scale=scale, segment_size=segment_size)


def moved_heads(order: Tensor) -> Tensor:
    """Heads in which some key moves, bool ``[Z, Ho]`` from an order ``[Z, Ho, Nk]``."""
    return (order != torch.arange(order.shape[-1], device=order.device)).any(dim=-1)


def check_seed(value: int) -> None:
    """An integer that is not negative."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"seed must be an integer, got {value!r}")
    if value < 0:
        raise ValueError(f"seed must not be negative, got {value}")


def sink_first(order: Tensor, segment_size: int) -> Tensor:
    """The order with token 0 at the first place; those before it move up by one.

    Args:
        order: ``[Z, Ho, Nk]``, token 0 anywhere in the first segment.
        segment_size: S.
    """
    first = order[..., :segment_size]
    place = first.argmin(dim=-1, keepdim=True)
    places = torch.arange(segment_size, device=order.device)
    source = torch.where(places == 0, place, torch.where(places <= place, places - 1, places))
    return torch.cat([first.gather(-1, source), order[..., segment_size:]], dim=-1)

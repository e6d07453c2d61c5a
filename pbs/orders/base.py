"""What a key order is, and the orders that sort keys by importance.

Legend: see :mod:`pbs.ops.grid`; P proxy queries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from pbs.ops.permutation import importance_order


class Order(ABC):
    """A permutation of the keys inside each complete segment."""

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

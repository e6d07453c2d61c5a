"""What a key order is, and the orders that sort keys by importance.

Legend: see :mod:`pbs.ops.grid`; P proxy queries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


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
        """The queries that vote, ``[Z, Hq, P, D]``."""

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
        num_sorted = k.shape[2] // segment_size * segment_size
        if not num_sorted:
            return None
        proxy = self.proxy_queries(q, block_size=block_size)
        if shared:
            groups = q.shape[1] // k.shape[1]
            proxy = proxy.unflatten(1, (k.shape[1], groups)).mean(dim=2, dtype=torch.float32)
            proxy = proxy.to(q.dtype)
        scores = importance(proxy, k[:, :, :num_sorted], scale=scale)
        return sort_segments(scores, num_keys=k.shape[2], segment_size=segment_size)


def importance(proxy: Tensor, k: Tensor, *, scale: float) -> Tensor:
    """Mean attention probability of each key over the proxy queries.

    Args:
        proxy: ``[Z, Ho, P, D]``.
        k: ``[Z, Hkv, N, D]``, Ho a multiple of Hkv.
        scale: factor of the logits.

    Returns:
        fp32 ``[Z, Ho, N]``. Works one key/value head at a time: (Ho / Hkv) P N scores in memory.
    """
    groups = proxy.shape[1] // k.shape[1]
    proxy = proxy.unflatten(1, (k.shape[1], groups))
    scores = []
    for head in range(k.shape[1]):
        keys = k[:, head, None].float().transpose(-1, -2)
        logits = proxy[:, head].float() @ keys * scale
        scores.append(logits.softmax(dim=-1).mean(dim=2))
    return torch.cat(scores, dim=1)


def sort_segments(scores: Tensor, *, num_keys: int, segment_size: int) -> Tensor:
    """Positions of the keys by descending score inside each segment, ties in natural order.

    Args:
        scores: ``[Z, Ho, n S]``, one per key of the complete segments.
        num_keys: Nk; keys from n S on keep their place.
        segment_size: S.

    Returns:
        int64 ``[Z, Ho, Nk]``.
    """
    segments = scores.unflatten(-1, (-1, segment_size))
    local = segments.argsort(dim=-1, descending=True, stable=True)
    starts = torch.arange(segments.shape[2], device=scores.device) * segment_size
    order = (local + starts[:, None]).flatten(-2)
    tail = torch.arange(order.shape[-1], num_keys, device=scores.device)
    return torch.cat([order, tail.expand(*order.shape[:2], -1)], dim=-1)

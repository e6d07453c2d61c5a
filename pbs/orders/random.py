"""A random permutation inside each segment: what an order without information does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from pbs.ops.permutation import sort_segments
from pbs.orders.base import Order, check_seed

# The golden ratio, and the constants of MurmurHash3's 32-bit finaliser.
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35
_LOW_32 = 0xFFFFFFFF


@dataclass(kw_only=True)
class RandomOrder(Order):
    """Every head shuffles every segment in its own way.

    A key's rank is a hash of (seed, head, position): the same on every device, for every sequence
    of a batch, in every layer and for every length.

    Args:
        seed: of the shuffles.

    Source: the ablation "random" of arXiv 2510.21270.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)

    @override
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
        batch, num_kv_heads, num_keys, _ = k.shape
        num_sorted = num_keys // segment_size * segment_size
        if not num_sorted:
            return None
        heads = torch.arange(num_kv_heads if shared else q.shape[1], device=k.device)
        positions = torch.arange(num_sorted, device=k.device)
        ranks = scramble(positions + scramble(heads + _GOLDEN * (self.seed + 1))[:, None])
        # 24 bits are what fp32 holds exactly; equal ranks keep their natural order.
        ranks = (ranks >> 8).float()
        order = sort_segments(ranks[None], num_keys=num_keys, segment_size=segment_size)
        return order.expand(batch, -1, -1).contiguous()


def scramble(x: Tensor) -> Tensor:
    """Hash the low 32 bits of int64 values into [0, 2^32); equal on every device."""
    x = (x * _GOLDEN) & _LOW_32
    x = ((x ^ (x >> 16)) * _MIX_1) & _LOW_32
    x = ((x ^ (x >> 13)) * _MIX_2) & _LOW_32
    return x ^ (x >> 16)

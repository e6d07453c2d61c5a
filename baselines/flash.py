"""Dense attention: what every sparse method is measured against."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pbs.checks import check_choice
from pbs.methods.base import AttentionMethod, Call
from pbs.methods.facts import Facts
from pbs.ops.block_sparse_attention import AS_GIVEN
from pbs.ops.dense import DENSE_KERNELS, choose_dense_kernel, dense_attention
from pbs.ops.plan import AttentionPlan


@dataclass(kw_only=True)
class FlashAttention(AttentionMethod):
    """Full causal attention. Density and coverage are 1.

    Args:
        kernel: one of ``pbs.ops.dense.DENSE_KERNELS``: "fa4", "fa3" and "fa2" (packages), SDPA's
            "cudnn", "flash" (FlashAttention-2), "efficient" and "math", or "auto", the fastest that
            supports the case. Results name the one that ran.

    Source: arXiv 2307.08691 (FlashAttention-2).
    """

    facts = Facts("dense (flash)", "#000000", "*", selection="none")

    kernel: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.kernel, DENSE_KERNELS, name="dense kernel")
        if self.precision != AS_GIVEN:
            raise ValueError(
                f"precision={self.precision!r} is for sparse plans; dense attention runs as given"
            )

    def select(self, call: Call) -> AttentionPlan:
        """Every causal tile."""
        return call.dense(f"dense method ({choose_dense_kernel(self.kernel, call.q, call.k)})")

    def compute_dense(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        """See the base class."""
        return dense_attention(q, k, v, scale=scale, kernel=self.kernel)

"""Triton on a CUDA device, else eager PyTorch. Legend: see :mod:`pbs.ops.grid`; L last queries."""

from __future__ import annotations

from torch import Tensor

from pbs.ops.backends import backend_module


def last_query_scores(
    q: Tensor, k: Tensor, *, scale: float, last_q: int = 64, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Attention that the last queries pay to each key and to each offset.

    With P = softmax(q_L kᵀ scale), causal: v[j] = Σ_r P[r, j] and u[o] = Σ_r P[r, position(r) - o].

    Args:
        q: ``[Z, Hq, Nq, D]``, after RoPE.
        k: ``[Z, Hkv, Nk, D]``, Nk >= Nq; queries are the last Nq tokens.
        scale: factor of the logits.
        last_q: L, how many of the last queries decide (all of them if there are fewer).
        backend: "auto", "reference" or "triton".

    Returns:
        Vertical and slash scores, both fp32 ``[Z, Hq, Nk]``. Of the [Hq, L, Nk] probabilities a
        bounded number exists at a time, but at least one head's.
    """
    module = backend_module("last_query_scores", backend, q)
    last_q = min(last_q, q.shape[2])
    found: tuple[Tensor, Tensor] = module.last_query_scores(q[:, :, -last_q:], k, scale=scale)
    return found

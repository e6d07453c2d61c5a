"""Pooled scores per band of rotary frequencies. Legend: see :mod:`pbs.ops.grid`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pbs.checks import check_choice
from pbs.ops.grid import BlockGrid
from pbs.ops.pooling import block_logits, mean_pool, softmax_over
from pbs.selectors.base import Selector


@dataclass(kw_only=True)
class LowBandSelector(Selector):
    """Mean pooling over the slowly turning dims only, with Prism's temperature.

    Averaging a block cancels dims that turn fast within it; the slow ones keep what the block is
    about, and do not depend on the order of the keys.

    Args:
        num_dims: dims of the band, even; None is three quarters of the head dim.
        rope_layout: "half" if dim x turns with dim x + D/2 (Llama, Qwen), "interleaved" if with its
            neighbour (GPT-J, GLM).

    Source: arXiv 2602.08426 (Prism), low band.
    """

    num_dims: int | None = None
    rope_layout: str = "half"

    def __post_init__(self) -> None:
        check_choice(self.rope_layout, ("half", "interleaved"), name="rope_layout")

    def block_probabilities(
        self, q: Tensor, k: Tensor, *, scale: float, grid: BlockGrid, candidates: Tensor
    ) -> Tensor:
        """See the base class."""
        num_dims = q.shape[3] * 3 // 4 if self.num_dims is None else self.num_dims
        dims = band_dims(q.shape[3], num_dims, band="low", layout=self.rope_layout)
        return band_probabilities(
            mean_pool(q, grid.query_tile),
            mean_pool(k, grid.key_tile),
            dims=dims,
            scale=scale,
            candidates=candidates,
        )


def band_dims(head_dim: int, num_dims: int, *, band: str, layout: str) -> list[int]:
    """The dims of the fastest ("high") or slowest ("low") rotary pairs.

    Raises:
        ValueError: ``num_dims`` odd, below 2 or above the head dim, or an odd head dim.
    """
    if head_dim % 2 or num_dims % 2 or not 2 <= num_dims <= head_dim:
        raise ValueError(
            f"a band needs an even number of dims in [2, {head_dim}] of an even head dim, got "
            f"{num_dims}"
        )
    pairs = num_dims // 2
    num_pairs = head_dim // 2
    chosen = range(pairs) if band == "high" else range(num_pairs - pairs, num_pairs)
    if layout == "half":
        return [*chosen, *(pair + num_pairs for pair in chosen)]
    return [dim for pair in chosen for dim in (2 * pair, 2 * pair + 1)]


def band_probabilities(
    q_blocks: Tensor, k_blocks: Tensor, *, dims: list[int], scale: float, candidates: Tensor
) -> Tensor:
    """softmax of the band's pooled logits, sharpened as much as the band is weaker than the whole.

    Args:
        q_blocks: pooled queries, fp32 ``[Z, Hq, Tq, D]``.
        k_blocks: pooled keys, fp32 ``[Z, Ho, Tk, D]``.
        dims: of the band.
        scale: factor of full logits (1 / sqrt(D)); the band's is that times sqrt(D / d).
        candidates: bool ``[Tq, Tk]``.

    Returns:
        fp32 ``[Z, Hq, Tq, Tk]``.
    """
    head_dim = q_blocks.shape[3]
    index = torch.tensor(dims, device=q_blocks.device)
    q_band, k_band = q_blocks[..., index], k_blocks[..., index]
    groups = q_blocks.shape[1] // k_blocks.shape[1]
    q_ratio = _rms(q_band) / _rms(q_blocks)
    k_ratio = (_rms(k_band) / _rms(k_blocks)).repeat_interleave(groups, dim=1)
    temperature = (len(dims) / head_dim) ** 0.5 * q_ratio * k_ratio
    # A band without any energy has logits 0: any temperature gives the uniform distribution.
    temperature = temperature.nan_to_num(0.0).clamp(min=torch.finfo(torch.float32).tiny)
    band_scale = scale * (head_dim / len(dims)) ** 0.5
    logits = block_logits(q_band, k_band) * band_scale / temperature
    return softmax_over(logits.nan_to_num(0.0), candidates)


def _rms(x: Tensor) -> Tensor:
    """Root mean square over blocks and dims, ``[Z, H, 1, 1]``."""
    return x.square().mean(dim=(2, 3), keepdim=True).sqrt()

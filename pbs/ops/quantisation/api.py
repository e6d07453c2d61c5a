"""Triton on a CUDA device, else eager PyTorch. Legend: see :mod:`pbs.ops.grid`.

The format is e4m3 (four bits of exponent, three of mantissa): 448 at most, and steps of an eighth
between powers of two. What is not finite becomes NaN; what shares its scale may.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pbs.ops.backends import backend_module

# The largest number of the format.
LARGEST = 448.0


def quantise_rows(
    x: Tensor,
    *,
    tile: int,
    order: Tensor | None = None,
    shift: Tensor | None = None,
    rotated: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Queries or keys in eight bits, with a scale for each tile of rows.

    Args:
        x: ``[Z, H, N, D]``, fp32, bf16 or fp16.
        tile: rows per scale, a power of two of at least 16 for the Triton backend.
        order: source of the row at each place, int64 ``[Z, Ho, N]``, Ho a multiple of H; None:
            rows stay.
        shift: what is subtracted from each row first, fp32 ``[Z, H, D]``; None: nothing. A constant
            subtracted from all keys changes a query's logits by one number, and its softmax not
            at all.
        rotated: multiply each row by :func:`rotation`, after the subtraction. Products of rotated
            queries and rotated keys are what they were, and a channel that stands out, whose
            rounding would decide all, is spread over many (FlashAttention-3, arXiv 2407.08608,
            section 3.3).
        backend: "auto", "reference" or "triton".

    Returns:
        float8_e4m3fn ``[Z, Ho, N, D]``, and what to multiply it by, fp32 ``[Z, Ho, T]``: the
        largest magnitude of the tile is LARGEST times that. Tiles of zeros have scale 1.

    Raises:
        NotImplementedError: the device has no such format.
    """
    found: tuple[Tensor, Tensor] = backend_module("quantisation", backend, x).quantise_rows(
        x, tile=tile, order=order, shift=shift, rotated=rotated
    )
    return found


def channel_scales(v: Tensor) -> Tensor:
    """What eight-bit values are multiplied by, channel by channel.

    Args:
        v: ``[Z, Hkv, N, D]``, fp32, bf16 or fp16.

    Returns:
        fp32 ``[Z, Hkv, D]``: the largest magnitude of the channel is LARGEST times that; 1 for a
        channel of zeros.
    """
    low, high = v.aminmax(dim=2)
    return scale_of(torch.maximum(-low, high).float())


def scale_of(largest: Tensor) -> Tensor:
    """The scale of what has these largest magnitudes."""
    return torch.where(largest == 0, 1.0, largest / LARGEST)


def quantise_values(
    v: Tensor, scales: Tensor, *, tile: int, order: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Values in eight bits, keys along rows of memory.

    Hopper's matrix unit takes eight-bit factors only with the dimension that is summed over
    contiguous: for weights times values the keys. A thread that has computed logits holds those of
    keys 2t, 2t + 1, 8 + 2t and 8 + 2t + 1 of every 16; as weights of the second product it must
    hold four that follow each other. So values are stored in the order in which threads hold
    weights (:func:`interleave`), and no weight has to move. (FlashAttention-3, arXiv 2407.08608,
    section 3.3, permutes bytes for the same reason.)

    Args:
        v: ``[Z, Hkv, N, D]``, fp32, bf16 or fp16.
        scales: :func:`channel_scales` of v.
        tile: N is filled up with zeros to a multiple of this, a power of two of at least 16.
        order: source of the value at each place, int64 ``[Z, Ho, N]``; None: values stay.
        backend: "auto", "reference" or "triton".

    Returns:
        float8_e4m3fn ``[Z, Ho, D, T tile]``.

    Raises:
        NotImplementedError: the device has no such format.
    """
    eight: Tensor = backend_module("quantisation", backend, v).quantise_values(
        v, scales, tile=tile, order=order
    )
    return eight


@lru_cache(maxsize=8)
def rotation(head_dim: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A symmetric orthogonal matrix of entries of one size, times the square root of that many.

    Hadamard's (Sylvester's form) where the head dim is a power of two, else blocks of the largest
    power of two that divides it. Kept: do not write into it.

    Args:
        head_dim: D.
        device: where it goes.
        dtype: of the result; all of them hold its entries exactly.

    Returns:
        1, -1 and 0, ``[D, D]``; its square is :func:`rotation_size` times the identity.
    """
    block = torch.ones(1, 1)
    while block.shape[0] < rotation_size(head_dim):
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    return torch.block_diag(*[block] * (head_dim // block.shape[0])).to(device, dtype)


def rotation_size(head_dim: int) -> int:
    """Channels that are spread over each other: the largest power of two that divides D."""
    return head_dim & -head_dim


def interleave(num_keys: int) -> Tensor:
    """Which key stands at each place of interleaved values, int64 ``[num_keys]``.

    Place 4t + 2g + j of every 16 holds key 8g + 2t + j (t to 3, g and j to 1).

    Args:
        num_keys: a multiple of 16.
    """
    return torch.arange(num_keys).view(-1, 2, 4, 2).transpose(1, 2).flatten()

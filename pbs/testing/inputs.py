"""Seeded queries, keys and values whose attention has the structure sparse methods live on.

Legend: see :mod:`pbs.ops.grid`.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pbs.registry import unknown

Structure = Literal["random", "vertical", "slash", "mixed"]

# One key in this many is a heavy hitter, and how many distances a slash head looks back.
HEAVY_KEY_SPACING = 96
NUM_SLASHES = 3


class QKV(NamedTuple):
    """Queries ``[Z, Hq, Nq, D]``, keys and values ``[Z, Hkv, Nk, D]``."""

    q: Tensor
    k: Tensor
    v: Tensor


def make_qkv(
    batch: int,
    q_heads: int,
    kv_heads: int,
    num_keys: int,
    head_dim: int,
    *,
    num_queries: int | None = None,
    dtype: torch.dtype = torch.float32,
    structure: Structure = "random",
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> QKV:
    """Draw attention inputs from a private generator.

    With the default scale 1 / sqrt(D), ``vertical`` makes about one key in a hundred, at random
    places and always token 0, take more than half of the attention of most queries (one query
    in eight ignores them). ``slash`` makes every query look at itself and at keys a few fixed
    distances back, as rotary embeddings do: queries and keys are one vector rotated by their
    positions, here with frequencies drawn from (0, pi) so that the lines are sharp. ``mixed`` gives
    the heads vertical lines, slashes and both in turn. Everything lies in noise of unit variance,
    and ``random`` is that noise alone.

    Args:
        batch: Z.
        q_heads: Hq, a multiple of ``kv_heads``.
        kv_heads: Hkv.
        num_keys: Nk.
        head_dim: D, even unless ``structure`` is "random".
        num_queries: Nq, the last tokens; default Nk.
        dtype: of the three tensors; the same numbers rounded, whatever the dtype.
        structure: "random", "vertical", "slash" or "mixed".
        seed: of the generator; equal seeds give equal numbers on every device.
        device: where the tensors lie.

    Raises:
        ValueError: counts that do not fit each other, or an unknown structure.
    """
    num_queries = num_keys if num_queries is None else num_queries
    if structure not in get_args(Structure):
        raise ValueError(unknown("structure", structure, get_args(Structure)))
    if min(batch, q_heads, kv_heads, head_dim) < 1 or q_heads % kv_heads:
        raise ValueError(
            "expected positive sizes and q_heads a multiple of kv_heads, got "
            f"batch={batch}, q_heads={q_heads}, kv_heads={kv_heads}, head_dim={head_dim}"
        )
    if not 0 < num_queries <= num_keys:
        raise ValueError(f"expected 0 < num_queries <= num_keys, got {num_queries} and {num_keys}")
    if structure != "random" and head_dim % 2:
        raise ValueError(f"structure {structure!r} needs an even head_dim, got {head_dim}")
    generator = torch.Generator().manual_seed(seed)
    # Drawn for all tokens, so that fewer queries are the same last queries.
    q = torch.randn(batch, q_heads, num_keys, head_dim, generator=generator)
    k = torch.randn(batch, kv_heads, num_keys, head_dim, generator=generator)
    v = torch.randn(batch, kv_heads, num_keys, head_dim, generator=generator)
    heads = torch.arange(q_heads)
    has_lines = (heads % 3 != 1) if structure == "mixed" else torch.full((q_heads,), True)
    has_slashes = (heads % 3 != 0) if structure == "mixed" else torch.full((q_heads,), True)
    if structure in ("vertical", "mixed"):
        _add_vertical_lines(q, k, has_lines, generator)
    if structure in ("slash", "mixed"):
        _add_slashes(q, k, has_slashes, generator)
    q = q[:, :, num_keys - num_queries :]
    return QKV(*(x.to(device=device, dtype=dtype).contiguous() for x in (q, k, v)))


def _add_vertical_lines(
    q: Tensor, k: Tensor, has_lines: Tensor, generator: torch.Generator
) -> None:
    """Give q (of the heads that have lines) and some keys one direction in common, in place."""
    batch, kv_heads, num_keys, head_dim = k.shape
    direction = torch.randn(batch, kv_heads, 1, head_dim, generator=generator)
    direction *= math.sqrt(head_dim) / direction.norm(dim=-1, keepdim=True)
    heavy = torch.rand(batch, kv_heads, num_keys, 1, generator=generator) < 1 / HEAVY_KEY_SPACING
    heavy[:, :, 0] = True
    # Together the heavy keys then weigh about twice as much as all others.
    boost = math.log(2 * HEAVY_KEY_SPACING) / math.sqrt(head_dim)
    follows = torch.rand(batch, q.shape[1], num_keys, 1, generator=generator) < 7 / 8
    gain = (follows & has_lines[:, None, None]).float() * math.sqrt(boost)
    k += heavy * direction * math.sqrt(boost)
    q += gain * direction.repeat_interleave(q.shape[1] // kv_heads, dim=1)


def _add_slashes(q: Tensor, k: Tensor, has_slashes: Tensor, generator: torch.Generator) -> None:
    """Rotate one vector by position into q (of the heads that have slashes) and k, in place."""
    batch, kv_heads, num_keys, head_dim = k.shape
    groups = q.shape[1] // kv_heads
    phase = torch.rand(batch, kv_heads, 1, head_dim // 2, generator=generator) * 2 * math.pi
    # Random ones: evenly spaced frequencies would repeat the lines every head_dim tokens.
    frequencies = torch.rand(head_dim // 2, generator=generator) * math.pi
    # A match weighs exp(boost), num_keys others about exp(1.5) each: noise meets amplitude.
    boost = math.log(max(num_keys, 2)) + 3
    amplitude = math.sqrt(boost / math.sqrt(head_dim) * 2)

    def rotated(positions: Tensor) -> Tensor:
        """Vectors of the positions ``[N]``, ``[Z, Hkv, N, D]``; a pair of equals scores boost."""
        angles = phase + positions[:, None] * frequencies
        return amplitude * torch.cat([angles.cos(), angles.sin()], dim=-1)

    positions = torch.arange(num_keys, dtype=torch.float32)
    distances = torch.rand(NUM_SLASHES - 1, generator=generator) * 0.5 * num_keys
    k += rotated(positions)
    for distance in [0.0, *distances.round().tolist()]:
        part = rotated(positions - distance).repeat_interleave(groups, dim=1)
        q += part * has_slashes[:, None, None]

"""How the kernel of :mod:`.triton_hopper` is launched. Legend: see :mod:`pbs.ops.grid`."""

from __future__ import annotations

from typing import NamedTuple

import triton
from torch import Tensor

from pbs.ops.block_sparse_attention.common import SCALED
from pbs.ops.block_sparse_attention.triton_hopper import hopper_attention_fwd_kernel
from pbs.ops.triton_hopper import ROWS, descriptor


class HopperOptions(NamedTuple):
    """Tile sizes and launch options of one compiled kernel."""

    block_n: int
    block_d: int
    num_stages: int


def hopper_options(
    *, head_dim: int, element_size: int, query_tile: int, key_tile: int, capability: tuple[int, int]
) -> HopperOptions | None:
    """What to launch, as measured on an H100 and checked for spills by ``make kernels``.

    Two stages of 128-key tiles fill an SM at D = 128; a third was no faster. A head dim above 128
    halves the keys a step. Of eight bits three stages take less memory than two of sixteen; two to
    four take the same time within 1 % (H200).

    Args:
        head_dim: D.
        element_size: bytes per element of q, k and v; 1: they will be quantised.
        query_tile: rows of the plan's tiles.
        key_tile: keys of the plan's tiles.
        capability: compute capability, (9, 0) for H100.

    Returns:
        None where this kernel does not run: other chips, fp32, query tiles below 128 rows (the two
        warpgroups share K and V), key tiles below 64, D above 256; in eight bits key tiles below
        128, D above 128 or no multiple of 16.
    """
    if capability != (9, 0) or element_size > 2 or query_tile < 2 * ROWS or key_tile < 64:
        return None
    # Descriptors have rows that are multiples of 16 bytes.
    if head_dim > 256 or head_dim * element_size % 16:
        return None
    block_d = max(64, triton.next_power_of_2(head_dim))
    if element_size == 1:
        return HopperOptions(SCALED, block_d, 3) if key_tile >= SCALED and block_d <= 128 else None
    block_n = 128 if key_tile >= 128 and block_d <= 128 else 64
    return HopperOptions(block_n, block_d, num_stages=2)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ordered_k: Tensor,
    ordered_v: Tensor,
    out: Tensor,
    *,
    lists: tuple[Tensor, Tensor, Tensor, Tensor],
    local_window: Tensor | None,
    query_tile: int,
    key_tile: int,
    scale_log2: float,
    options: HopperOptions,
    scales: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Write the attention of a plan into ``out``.

    Args:
        q: ``[Z, Hq, Nq, D]``, as all inputs fit for descriptors.
        k: ``[Z, Hkv, Nk, D]`` in natural order.
        v: ``[Z, Hkv, Nk, D]`` in natural order; of eight bits ``[Z, Hkv, D, T key_tile]``, see
            :func:`pbs.ops.quantisation.quantise_values`.
        ordered_k: ``[Z, Ho, Nk, D]`` in plan order.
        ordered_v: ``[Z, Ho, Nk, D]`` in plan order; of eight bits as v.
        out: ``[Z, Hq, Nq, D]``.
        lists: the plan's blocks, num_blocks, windows and num_windows, spread over Z and Hq.
        local_window: the plan's.
        query_tile: rows of the plan's tiles.
        key_tile: keys of the plan's tiles.
        scale_log2: factor of the logits times log2(e), positive.
        options: from :func:`hopper_options`.
        scales: of eight-bit tensors, as in the kernel; windows then begin at multiples of
            ``key_tile``.
    """
    batch, num_heads, num_queries, head_dim = q.shape
    block_n, block_d = options.block_n, options.block_d
    value_box = (block_n, block_d) if scales is None else (block_d, block_n)
    hopper_attention_fwd_kernel[(triton.cdiv(num_queries, 2 * ROWS), batch * num_heads)](
        descriptor(q, ROWS, block_d),
        descriptor(k, block_n, block_d),
        descriptor(v, *value_box),
        descriptor(ordered_k, block_n, block_d),
        descriptor(ordered_v, *value_box),
        out,
        *lists,
        lists[1] if local_window is None else local_window,
        out.stride(),
        *(x.stride() for x in lists),
        scale_log2,
        scales,
        num_heads,
        k.shape[1],
        ordered_k.shape[1],
        num_queries,
        k.shape[2],
        HEAD_DIM=head_dim,
        QUERY_TILE=query_tile,
        KEY_TILE=key_tile,
        HAS_LOCAL_WINDOW=local_window is not None,
        STAGES=options.num_stages,
        num_warps=4,
    )

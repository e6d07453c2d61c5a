"""Triton: rows are read once, where they lie, and written once. Legend: see :mod:`pbs.ops.grid`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pbs.ops.primitives import load_rows
from pbs.ops.quantisation.api import LARGEST, rotation, rotation_size

# The first capability with e4m3.
CAPABILITY = (8, 9)


@triton.jit
def _load_places(
    x_ptr, x_strides, order_ptr, places, sizes, dims, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Rows at some places of this program's head in fp32, which exist, and its channels' offset.

    Args:
        sizes: heads and tokens.
    """
    num_heads, num_tokens = sizes
    plane = tl.program_id(1).to(tl.int64)
    batch, head = plane // num_heads, plane % num_heads // GROUP
    exists = places < num_tokens
    source = places
    if order_ptr is not None:
        source = tl.load(order_ptr + plane * num_tokens + places, mask=exists, other=0)
    base = x_ptr + batch * x_strides[0] + head * x_strides[1]
    rows = load_rows(base, source, x_strides[2], exists, dims, HEAD_DIM).to(tl.float32)  # [N, D]
    return rows, exists, (batch * (num_heads // GROUP) + head) * HEAD_DIM


@triton.jit
def _limit(x, MAXIMUM: tl.constexpr):
    """A product may come out above the limit by a rounding; NaN stays NaN."""
    return tl.clamp(x, -MAXIMUM, MAXIMUM, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def quantise_rows_kernel(
    x_ptr,
    order_ptr,
    shift_ptr,
    rotation_ptr,
    eight_ptr,
    scales_ptr,
    x_strides,
    num_heads,
    num_tokens,
    rotation_scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    MAXIMUM: tl.constexpr,
):
    """One program: one tile of rows of one head, and its scale."""
    plane = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    places = tl.program_id(0) * TILE + tl.arange(0, TILE)
    rows, exists, channels = _load_places(
        x_ptr, x_strides, order_ptr, places, (num_heads, num_tokens), dims, GROUP, HEAD_DIM
    )
    keep = exists[:, None] & (dims < HEAD_DIM)[None, :]
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + channels + dims, mask=dims < HEAD_DIM, other=0.0)
        rows = tl.where(keep, rows - shift[None, :], 0.0)
    if rotation_ptr is not None:
        inside = (dims < HEAD_DIM)[:, None] & (dims < HEAD_DIM)[None, :]
        entries = dims[:, None] * HEAD_DIM + dims[None, :]
        rotation = tl.load(rotation_ptr + entries, mask=inside, other=0.0)  # [D, D]
        # Of the rows' dtype, so that the matrix unit multiplies them.
        rows = tl.dot(rows.to(rotation.dtype), rotation, input_precision="ieee")  # [N, D]
        rows *= rotation_scale
    largest = tl.max(tl.max(tl.abs(rows), 1), 0)
    scale = tl.where(largest == 0, 1.0, tl.div_rn(largest, MAXIMUM))
    inverse = tl.div_rn(tl.full([], 1.0, tl.float32), scale)
    eight = _limit(rows * inverse, MAXIMUM).to(eight_ptr.dtype.element_ty)
    out = eight_ptr + (plane * num_tokens + places)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out, eight, mask=keep)
    tl.store(scales_ptr + plane * tl.num_programs(0) + tl.program_id(0), scale)


@triton.jit
def quantise_values_kernel(
    v_ptr,
    order_ptr,
    inverse_ptr,
    eight_ptr,
    v_strides,
    num_heads,
    num_tokens,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MAXIMUM: tl.constexpr,
):
    """One program: BLOCK_N places of one head, channels along the first dimension."""
    plane = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    places = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Place 4t + 2g + j of 16 holds key 8g + 2t + j.
    inside = places % 16
    keys = places - inside + inside // 2 % 2 * 8 + inside // 4 * 2 + inside % 2
    rows, _, channels = _load_places(
        v_ptr, v_strides, order_ptr, keys, (num_heads, num_tokens), dims, GROUP, HEAD_DIM
    )
    inverse = tl.load(inverse_ptr + channels + dims, mask=dims < HEAD_DIM, other=0.0)
    eight = _limit(rows * inverse[None, :], MAXIMUM).to(eight_ptr.dtype.element_ty)
    num_places = (num_tokens + TILE - 1) // TILE * TILE
    # Programs end with the last place: num_places is a multiple of BLOCK_N.
    out = eight_ptr + (plane * HEAD_DIM + dims)[:, None] * num_places + places[None, :]
    tl.store(out, tl.trans(eight), mask=(dims < HEAD_DIM)[:, None])


def quantise_rows(
    x: Tensor,
    *,
    tile: int,
    order: Tensor | None,
    shift: Tensor | None,
    rotated: bool,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> tuple[Tensor, Tensor]:
    """See :func:`pbs.ops.quantisation.api.quantise_rows`.

    Args:
        x: as there, like all but ``dtype``.
        tile: as there.
        order: as there.
        shift: as there.
        rotated: as there.
        dtype: of the result. fp32 in tests: Triton's interpreter rounds to e4m3 wrongly.
    """
    _check_format(x)
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, num_heads, num_tokens, head_dim = x.shape
    planes = num_heads if order is None else order.shape[1]
    num_tiles = triton.cdiv(num_tokens, tile)
    eight = x.new_empty(batch, planes, num_tokens, head_dim, dtype=dtype)
    scales = x.new_empty(batch, planes, num_tiles, dtype=torch.float32)
    block_d = triton.next_power_of_2(max(head_dim, 16))
    quantise_rows_kernel[(num_tiles, batch * planes)](
        x,
        None if order is None else order.contiguous(),
        None if shift is None else shift.contiguous(),
        rotation(head_dim, x.device, x.dtype) if rotated else None,
        eight,
        scales,
        x.stride(),
        planes,
        num_tokens,
        rotation_size(head_dim) ** -0.5,
        GROUP=planes // num_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        TILE=tile,
        MAXIMUM=LARGEST,
        num_warps=8 if tile * block_d > 8192 else 4,
    )
    return eight, scales


def quantise_values(
    v: Tensor,
    scales: Tensor,
    *,
    tile: int,
    order: Tensor | None,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> Tensor:
    """See :func:`pbs.ops.quantisation.api.quantise_values`; ``dtype`` as above."""
    _check_format(v)
    v = v if v.stride(3) == 1 else v.contiguous()
    batch, num_heads, num_tokens, head_dim = v.shape
    planes = num_heads if order is None else order.shape[1]
    block_n = min(tile, 64)
    num_places = triton.cdiv(num_tokens, tile) * tile
    eight = v.new_empty(batch, planes, head_dim, num_places, dtype=dtype)
    quantise_values_kernel[(num_places // block_n, batch * planes)](
        v,
        None if order is None else order.contiguous(),
        1.0 / scales,
        eight,
        v.stride(),
        planes,
        num_tokens,
        GROUP=planes // num_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        TILE=tile,
        BLOCK_N=block_n,
        MAXIMUM=LARGEST,
    )
    return eight


def _check_format(x: Tensor) -> None:
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < CAPABILITY:
        name = torch.cuda.get_device_name(x.device)
        raise NotImplementedError(
            f"eight-bit floats (e4m3) need compute capability {CAPABILITY[0]}.{CAPABILITY[1]}; "
            f"{name} has none: leave precision out"
        )

"""Triton kernel for NVIDIA GPUs; runs on a CPU in Triton's interpreter, for tests.

On Hopper, plans of whole tiles in the dtypes of models go to :mod:`.triton_hopper` instead.

Legend: see :mod:`pbs.ops.grid`. In the kernel: M query rows, N keys, D head dim (padded to a power
of two).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pbs.ops.block_sparse_attention.common import AS_GIVEN, FP8
from pbs.ops.block_sparse_attention.eight_bits import quantise_inputs
from pbs.ops.block_sparse_attention.triton_hopper_launch import HopperOptions, hopper_options
from pbs.ops.block_sparse_attention.triton_hopper_launch import launch as launch_hopper
from pbs.ops.block_sparse_attention.triton_parts import (
    attend,
    attend_tile,
    attend_windows_by_value,
    head_of,
    list_of,
    sees,
)
from pbs.ops.block_sparse_attention.tuned import tuned
from pbs.ops.permutation import gather_keys
from pbs.ops.plan import AttentionPlan
from pbs.ops.primitives import LOG2_E, load_rows, offset
from pbs.ops.stages import stage
from pbs.ops.triton_hopper import for_descriptor


@triton.jit
def block_sparse_attention_fwd_kernel(
    q_ptr,
    natural,
    ordered,
    k_descriptor,
    v_descriptor,
    ordered_k_descriptor,
    ordered_v_descriptor,
    out_ptr,
    q_strides,
    out_strides,
    blocks,
    windows,
    columns,
    query_order,
    local_windows_ptr,
    scale_log2,
    sizes,
    KV_GROUP: tl.constexpr,
    ORDER_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
):
    """One program: BLOCK_M rows of one query tile of one head, over all keys the plan names.

    Args:
        natural, ordered: pointers to keys and values, their strides, and how many heads they have.
        k_descriptor: for the tensor memory accelerator, like the three after it; None without.
        blocks, windows, columns: lists, their lengths, the strides of both; columns may be None.
        query_order: pointer and strides; None: queries lie in natural order.
        local_windows_ptr: two integers for each head; None: windows are causal.
        sizes: heads, queries, keys.
    """
    num_heads, num_queries, num_keys = sizes
    # Later query tiles see more keys: start the longest programs first.
    part = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1) // num_heads
    head = tl.program_id(1) % num_heads
    tile = part * BLOCK_M // QUERY_TILE
    rows = part * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    real = rows < num_queries
    dims = tl.arange(0, BLOCK_D)  # [D]
    keys = tl.arange(0, BLOCK_N)  # [N]

    source = rows
    if query_order is not None:
        pointers = query_order[0] + offset(query_order[1], batch, head) + rows
        source = tl.load(pointers, mask=real, other=0).to(tl.int32)
    positions = tl.where(real, source + num_keys - num_queries, -1)

    q_base = q_ptr + offset(q_strides, batch, head)
    q = load_rows(q_base, source, q_strides[2], real, dims, HEAD_DIM)  # [M, D]
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)

    PARTS: tl.constexpr = KEY_TILE // BLOCK_N
    natural_head = head_of(natural, batch, head // KV_GROUP)
    descriptors = (k_descriptor, v_descriptor)
    # 1. Windows in natural order, with the causal mask per token.
    local_window = None
    if local_windows_ptr is not None:
        pair = local_windows_ptr + head * 2
        local_window = (tl.load(pair), tl.load(pair + 1))
    entries, count = list_of(windows, batch, head, tile)
    for step in range(count * PARTS):
        start = tl.load(entries + step // PARTS) + step % PARTS * BLOCK_N
        seen = sees(positions[:, None], (start + keys)[None, :], local_window)
        acc, row_max, row_sum = attend_tile(
            (acc, row_max, row_sum), q, natural_head, descriptors, start, num_keys, seen,
            scale_log2, HEAD_DIM, BLOCK_N, True,
        )  # fmt: skip
    # 0 * NaN and 0 * inf: a value that is not finite has reached rows that do not see it. Windows
    # alone are masked, so nothing after them can do that.
    if tl.max(tl.max((acc != acc).to(tl.int32), 1), 0) > 0:
        acc, row_max, row_sum = attend_windows_by_value(
            q, natural_head, entries, count, positions, num_keys, local_window,
            scale_log2, HEAD_DIM, BLOCK_N, KEY_TILE,
        )  # fmt: skip

    # 2. Key tiles that every row sees, in plan order: no mask. They are whole, so all keys exist.
    ordered_head = head_of(ordered, batch, head // ORDER_GROUP)
    descriptors = (ordered_k_descriptor, ordered_v_descriptor)
    entries, count = list_of(blocks, batch, head, tile)
    for step in range(count * PARTS):
        start = tl.load(entries + step // PARTS).to(tl.int32) * KEY_TILE + step % PARTS * BLOCK_N
        acc, row_max, row_sum = attend_tile(
            (acc, row_max, row_sum), q, ordered_head, descriptors, start, num_keys, None,
            scale_log2, HEAD_DIM, BLOCK_N, False,
        )  # fmt: skip

    # 3. Single columns in natural order, gathered BLOCK_N at a time.
    if columns is not None:
        k_base, v_base, k_stride, v_stride, _ = natural_head
        entries, count = list_of(columns, batch, head, tile)
        for step in range(0, count, BLOCK_N):
            exists = step + keys < count
            column = tl.load(entries + step + keys, mask=exists, other=0)
            k = load_rows(k_base, column, k_stride, exists, dims, HEAD_DIM)
            v = load_rows(v_base, column, v_stride, exists, dims, HEAD_DIM)
            acc, row_max, row_sum = attend(
                (acc, row_max, row_sum), q, k, v, exists[None, :], scale_log2, True
            )

    # A query without keys has sum 0 and accumulator 0: its output is 0.
    out = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]  # [M, D]
    out_base = out_ptr + offset(out_strides, batch, head)
    pointers = out_base + source.to(tl.int64)[:, None] * out_strides[2] + dims[None, :]
    keep = real[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=keep)


class LaunchOptions(NamedTuple):
    """Tile sizes and launch options of one compiled kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    use_tma: bool


def launch_options(
    *, head_dim: int, element_size: int, query_tile: int, key_tile: int, capability: tuple[int, int]
) -> LaunchOptions:
    """What to launch, as measured on an H100 and checked for spills by ``make kernels``.

    Hopper and newer load whole tiles of K and V by the tensor memory accelerator; 128 x 128 with
    two stages then fills 160 KB of shared memory and 217 registers. Older chips gather by pointers,
    64 keys a step, so that three stages fit 164 KB. A head dim above 128 doubles a tile's bytes and
    halves its side.

    Args:
        head_dim: D.
        element_size: bytes per element of q, k and v.
        query_tile: rows of the plan's tiles.
        key_tile: keys of the plan's tiles.
        capability: compute capability, (9, 0) for H100.
    """
    use_tma = capability >= (9, 0)
    if element_size > 2:
        # No matrix unit multiplies fp32 exactly: small tiles keep the products in registers.
        return LaunchOptions(min(query_tile, 32), min(key_tile, 32), 4, 2, use_tma)
    is_wide = head_dim > 128
    block_m = min(query_tile, 64 if is_wide else 128)
    block_n = min(key_tile, 128 if use_tma and not is_wide else 64)
    num_warps = 8 if block_m == 128 else 4
    num_stages = 2 if use_tma or is_wide else 3
    return LaunchOptions(block_m, block_n, num_warps, num_stages, use_tma)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    precision: str = AS_GIVEN,
    uses_hopper: bool | None = None,
) -> Tensor:
    """See :func:`pbs.ops.block_sparse_attention.api.block_sparse_attention`.

    Args:
        q: as there, like all but ``uses_hopper``.
        k: as there.
        v: as there.
        plan: as there.
        scale: as there.
        precision: as there.
        uses_hopper: whether the Hopper kernel runs; None: where it can.
    """
    if not q.is_cuda:
        _check_interpreter(q)
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    shape = {
        "head_dim": q.shape[3],
        "element_size": 1 if precision == FP8 else q.element_size(),
        "query_tile": plan.grid.query_tile,
        "key_tile": plan.grid.key_tile,
        "capability": torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0),
    }
    hopper = None
    has_tiles_alone = plan.columns is None and plan.query_order is None
    if uses_hopper is not False and has_tiles_alone and not triton.knobs.runtime.interpret:
        hopper = hopper_options(**shape)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lists = _Lists.of(plan)
    scale_log2 = scale * LOG2_E
    if precision == FP8:
        if hopper is None:
            raise NotImplementedError(_no_fp8(shape))
        # No measured options: what shares a scale must be what a step of the kernel works on.
        with stage("gather"):
            eight = quantise_inputs(q, k, v, plan.order)
        _launch_hopper(eight.tensors, out, plan, lists, scale_log2, hopper, eight.scales)
        return out
    if hopper is not None:
        hopper = tuned("hopper", shape, hopper)
    elif uses_hopper:
        raise NotImplementedError(
            "backend 'hopper' needs a Hopper GPU, 16-bit tensors, a head dim of at most 256, query "
            "tiles of at least 128 rows and a plan without columns or moved queries; use 'auto'"
        )
    options = tuned("triton", shape, launch_options(**shape))
    if hopper is not None:
        q = for_descriptor(q)
    if hopper is not None or options.use_tma:
        k, v = for_descriptor(k), for_descriptor(v)
    ordered_k, ordered_v = k, v
    if plan.order is not None:
        with stage("gather"):
            ordered_v = gather_keys(v, plan.order)
            ordered_k = plan.ordered_keys
            if ordered_k is None:
                ordered_k = gather_keys(k, plan.order)
    tensors = (q, k, v, ordered_k, ordered_v)
    if hopper is not None:
        _launch_hopper(tensors, out, plan, lists, scale_log2, hopper)
    else:
        with _device_of(q):
            _launch(*tensors, out, plan, lists, scale_log2, options)
    return out


def _no_fp8(shape: dict[str, Any]) -> str:
    """Why eight bits cannot run."""
    return (
        "precision='fp8' needs a Hopper GPU, a head dim that is a multiple of 16 and at most 128, "
        "tiles of at least 128 and a plan without columns or moved queries; got capability "
        f"{shape['capability']}, head dim {shape['head_dim']}, tiles of {shape['query_tile']} x "
        f"{shape['key_tile']}. Leave precision out, or ask for backend='reference', which emulates "
        "it"
    )


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    """Where kernels are launched."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _launch_hopper(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    out: Tensor,
    plan: AttentionPlan,
    lists: _Lists,
    scale_log2: float,
    options: HopperOptions,
    scales: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> None:
    """The kernel of :mod:`.triton_hopper`."""
    with _device_of(out):
        launch_hopper(
            *tensors,
            out,
            lists=lists[:4],
            local_window=plan.local_window,
            query_tile=plan.grid.query_tile,
            key_tile=plan.grid.key_tile,
            scale_log2=scale_log2,
            options=options,
            scales=scales,
        )


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ordered_k: Tensor,
    ordered_v: Tensor,
    out: Tensor,
    plan: AttentionPlan,
    lists: _Lists,
    scale_log2: float,
    options: LaunchOptions,
) -> None:
    """The kernel of this module."""
    batch, num_heads, num_queries, head_dim = q.shape
    block_d = triton.next_power_of_2(max(head_dim, 16))
    descriptors: list[TensorDescriptor | None] = [None] * 4
    if options.use_tma:
        box = [1, options.block_n, block_d]
        descriptors = [
            TensorDescriptor.from_tensor(x.flatten(0, 1), box) for x in (k, v, ordered_k, ordered_v)
        ]
    programs = (triton.cdiv(num_queries, options.block_m), batch * num_heads)
    query_order, local_window = plan.query_order, plan.local_window
    block_sparse_attention_fwd_kernel[programs](
        q,
        (k, v, k.stride(), v.stride(), k.shape[1]),
        (ordered_k, ordered_v, ordered_k.stride(), ordered_v.stride(), ordered_k.shape[1]),
        *descriptors,
        out,
        q.stride(),
        out.stride(),
        _with_strides(lists.blocks, lists.num_blocks),
        _with_strides(lists.windows, lists.num_windows),
        _with_strides(lists.columns, lists.num_columns),
        None if query_order is None else (query_order, query_order.stride()),
        local_window,
        scale_log2,
        (num_heads, num_queries, k.shape[2]),
        KV_GROUP=num_heads // k.shape[1],
        ORDER_GROUP=num_heads // ordered_k.shape[1],
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_M=options.block_m,
        BLOCK_N=options.block_n,
        QUERY_TILE=plan.grid.query_tile,
        KEY_TILE=plan.grid.key_tile,
        num_warps=options.num_warps,
        num_stages=options.num_stages,
    )


def _with_strides(
    lists: Tensor | None, counts: Tensor | None
) -> tuple[Tensor, Tensor, tuple[int, ...], tuple[int, ...]] | None:
    if lists is None or counts is None:
        return None
    return lists, counts, lists.stride(), counts.stride()


def _check_interpreter(q: Tensor) -> None:
    if not triton.knobs.runtime.interpret:
        raise NotImplementedError(
            f"backend 'triton' got tensors on {q.device}; it needs a CUDA device, or "
            "TRITON_INTERPRET=1 set before this module is imported (slow, for tests). Use "
            "backend='auto' or 'cpu'"
        )
    if q.dtype == torch.bfloat16:
        raise NotImplementedError(
            "Triton's interpreter multiplies the bit patterns of bf16; use fp32 or fp16 there"
        )


class _Lists(NamedTuple):
    """The plan's lists, spread over sequences and heads (stride 0)."""

    blocks: Tensor
    num_blocks: Tensor
    windows: Tensor
    num_windows: Tensor
    columns: Tensor | None
    num_columns: Tensor | None

    @classmethod
    def of(cls, plan: AttentionPlan) -> _Lists:
        shape = (plan.batch_size, plan.num_heads)
        lists = (plan.blocks, plan.windows, plan.columns)
        counts = (plan.num_blocks, plan.num_windows, plan.num_columns)
        spread = [None if x is None else x.expand(*shape, -1, -1) for x in lists]
        numbers = [None if x is None else x.expand(*shape, -1) for x in counts]
        return cls(*(x for pair in zip(spread, numbers, strict=True) for x in pair))

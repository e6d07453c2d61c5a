"""Triton: log-sums of the rows first, then a program holds some keys and passes over their rows.

Legend: see :mod:`pbs.ops.grid`; M rows of a step, T keys of a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pbs.ops.primitives import LOG2_E, finite, load_rows, offset
from pbs.ops.tile_logsumexp.triton import tile_logsumexp

LN_2 = 1 / LOG2_E
# Keys of a program and rows of a step; few where there are no matrix units.
BLOCK = 128
BLOCK_FP32 = 32
# Partial log-sums held at once: 2^26 fp32 values are 256 MB.
MAX_PARTS = 1 << 26


@triton.jit
def key_power_sums_kernel(
    rows_ptr,
    keys_ptr,
    norms_ptr,
    ends_ptr,
    firsts_ptr,
    sums_ptr,
    rows_strides,
    keys_strides,
    num_heads,
    num_rows,
    num_keys,
    scale_log2,
    power,
    ln_2,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: some keys of one query head, and the rows that see any of them."""
    plane = tl.program_id(1).to(tl.int64)
    batch, head = plane // num_heads, plane % num_heads
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [T]
    dims = tl.arange(0, BLOCK_D)
    k_base = keys_ptr + offset(keys_strides, batch, head // GROUP)
    k = load_rows(k_base, tokens, keys_strides[2], tokens < num_keys, dims, HEAD_DIM)  # [T, D]
    q_base = rows_ptr + offset(rows_strides, batch, head)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    first = tl.load(firsts_ptr + tl.program_id(0)) // BLOCK * BLOCK
    for start in range(first, num_rows, BLOCK):
        rows = start + tl.arange(0, BLOCK)  # [M]
        is_row = rows < num_rows
        q = load_rows(q_base, rows, rows_strides[2], is_row, dims, HEAD_DIM)  # [M, D]
        ends = tl.load(ends_ptr + rows, mask=is_row, other=0)
        norms = tl.load(norms_ptr + plane * num_rows + rows, mask=is_row, other=0.0)
        logits = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2  # [T, M]
        logits = (logits - finite(norms)[None, :]) * power
        logits = tl.where(tokens[:, None] < ends[None, :], logits, float("-inf"))
        higher = tl.maximum(largest, tl.max(logits, 1))
        known = finite(higher)
        total = total * tl.exp2(largest - known) + tl.sum(tl.exp2(logits - known[:, None]), 1)
        largest = higher
    value = (largest + tl.log2(tl.maximum(total, 1e-37))) * ln_2
    tl.store(sums_ptr + plane * num_keys + tokens, value, mask=tokens < num_keys)


def key_power_sums(
    rows: Tensor, keys: Tensor, ends: Tensor, *, scale: float, power: float
) -> Tensor:
    """See :func:`pbs.ops.key_power_sums.api.key_power_sums`."""
    rows, keys = (x if x.stride(3) == 1 else x.contiguous() for x in (rows, keys))
    batch, num_heads, num_rows, head_dim = rows.shape
    num_keys, groups = keys.shape[2], num_heads // keys.shape[1]
    ends = ends.int().contiguous()
    norms = rows.new_empty(batch, num_heads, num_rows, dtype=torch.float32)
    block = BLOCK if rows.element_size() < 4 else BLOCK_FP32
    step = max(1, MAX_PARTS // (batch * groups * num_rows * triton.cdiv(num_keys, block)))
    for head in range(0, keys.shape[1], step):  # [R, Tk] log-sums of some heads at a time
        heads = slice(head * groups, (head + step) * groups)
        parts = tile_logsumexp(
            *(rows[:, heads], keys[:, head : head + step]),
            ends.expand(min(groups * step, num_heads - head * groups), -1),
            tile=block,
            scale=scale,
            natural=None,
            until=None,
        )
        norms[:, heads] = parts.logsumexp(dim=-1)
    begins = torch.arange(0, num_keys, block, dtype=torch.int32, device=rows.device)
    firsts = torch.searchsorted(ends, begins, right=True, out_int32=True)
    sums = rows.new_empty(batch, num_heads, num_keys, dtype=torch.float32)
    key_power_sums_kernel[(triton.cdiv(num_keys, block), batch * num_heads)](
        rows,
        keys,
        norms.mul_(LOG2_E),
        ends,
        firsts,
        sums,
        rows.stride(),
        keys.stride(),
        num_heads,
        num_rows,
        num_keys,
        scale * LOG2_E,
        float(power),
        LN_2,
        GROUP=groups,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK=block,
        num_warps=8 if block == BLOCK else 4,
        num_stages=2,
        maxnreg=128 if block == BLOCK else None,  # two programs on a multiprocessor
    )
    return sums

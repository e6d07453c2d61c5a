"""Triton: the softmax's sums, then each probability written once, where diagonals are columns.

Legend: see :mod:`pbs.ops.grid`; L last queries. In the kernel: M of them, N keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pbs.ops.last_query_scores.reference import sum_by_offset
from pbs.ops.primitives import LOG2_E, load_rows, offset
from pbs.ops.tile_logsumexp.triton import tile_logsumexp

# Probabilities held at once: 256 MB.
MAX_ELEMENTS = 1 << 26
TILE = 128


@triton.jit
def last_query_probabilities_kernel(
    q_ptr,
    k_ptr,
    norms_ptr,
    probabilities_ptr,
    vertical_ptr,
    q_strides,
    k_strides,
    scale_log2,
    first_plane,
    num_heads,
    num_rows,
    num_keys,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: some keys of one head, all last queries."""
    local = tl.program_id(1).to(tl.int64)
    plane = first_plane + local
    batch, head = plane // num_heads, plane % num_heads
    keys = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    is_key = keys < num_keys
    dims = tl.arange(0, BLOCK_D)
    k_base = k_ptr + offset(k_strides, batch, head // GROUP)
    k = load_rows(k_base, keys, k_strides[2], is_key, dims, HEAD_DIM)  # [N, D]
    q_base = q_ptr + offset(q_strides, batch, head)
    width = num_keys + num_rows - 1
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, num_rows, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)  # [M]
        is_row = rows < num_rows
        q = load_rows(q_base, rows, q_strides[2], is_row, dims, HEAD_DIM)  # [M, D]
        norms = tl.load(norms_ptr + plane * num_rows + rows, mask=is_row, other=float("inf"))
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2  # [M, N]
        seen = keys[None, :] <= (num_keys - num_rows + rows)[:, None]
        logits = tl.where(seen, logits - norms[:, None], float("-inf"))
        weights = tl.exp2(logits)
        total += tl.sum(weights, 0)
        places = (local * num_rows + rows)[:, None] * width + num_rows - 1 + keys[None, :]
        keep = is_row[:, None] & is_key[None, :]
        tl.store(probabilities_ptr + places, weights, mask=keep)
    tl.store(vertical_ptr + plane * num_keys + keys, total, mask=is_key)


def last_query_scores(q: Tensor, k: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """See :func:`pbs.ops.last_query_scores.reference.last_query_scores`."""
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    batch, num_heads, last_q, head_dim = q.shape
    num_keys = k.shape[2]
    ends = torch.arange(num_keys - last_q + 1, num_keys + 1, device=q.device)
    sums = tile_logsumexp(
        *(q, k, ends.expand(num_heads, -1)), tile=TILE, scale=scale, natural=None, until=None
    )
    norms = sums.logsumexp(dim=-1).mul_(LOG2_E).contiguous()
    vertical = q.new_empty(batch, num_heads, num_keys, dtype=torch.float32)
    slash = torch.empty_like(vertical)
    planes, width = batch * num_heads, num_keys + last_q - 1
    step = min(planes, max(1, MAX_ELEMENTS // (last_q * width)))
    # Zeros before the first key stay; everything else is written each time.
    padded = q.new_zeros(step, last_q, width, dtype=torch.float32)
    block_m, block_n, num_warps = min(128, max(16, triton.next_power_of_2(last_q))), 64, 8
    if q.element_size() == 4 or head_dim > 128:
        block_m, block_n, num_warps = 16, 32, 4
    for first in range(0, planes, step):
        count = min(step, planes - first)
        last_query_probabilities_kernel[(triton.cdiv(num_keys, block_n), count)](
            q,
            k,
            norms,
            padded,
            vertical,
            q.stride(),
            k.stride(),
            scale * LOG2_E,
            first,
            num_heads,
            last_q,
            num_keys,
            GROUP=num_heads // k.shape[1],
            HEAD_DIM=head_dim,
            BLOCK_D=triton.next_power_of_2(max(head_dim, 16)),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=num_warps,
            num_stages=2,
        )
        slash.view(planes, num_keys)[first : first + count] = sum_by_offset(
            padded[:count], num_keys
        )
    return vertical, slash

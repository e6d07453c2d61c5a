"""What the Gluon kernels for Hopper share: tiles through a ring of buffers, products, descriptors.

Legend: see :mod:`pbs.ops.grid`. In a kernel: M rows of q that a warpgroup has, N keys, D head dim.
"""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Rows of q that one warpgroup works on: what its matrix instructions take.
ROWS = 64
# Columns of logits after which the same threads hold the next.
_LANES = gl.constexpr(8)


def descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Boxes of one head of ``[Z, H, N, D]``; what lies outside reads as 0."""
    layout = _shared_layout(columns, x.element_size())
    return TensorDescriptor.from_tensor(x.flatten(0, 1), [1, rows, columns], layout)


@lru_cache(maxsize=32)
def _shared_layout(columns: int, element_size: int) -> gl.NVMMASharedLayout:
    """Kept: making one takes longer than all else of a descriptor."""
    return gl.NVMMASharedLayout(min(128, columns * element_size), 8 * element_size, rank=3)


def for_descriptor(x: Tensor) -> Tensor:
    """x if sequences and heads form one dimension and rows start at 16 bytes, else a copy."""
    step = 16 // x.element_size()
    fits = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    aligned = x.stride(1) % step == 0 and x.stride(2) % step == 0 and x.data_ptr() % 16 == 0
    return x if fits and aligned else x.contiguous()


@gluon.jit
def load_tile(
    descriptor,
    plane,
    start,
    buffers,
    ready,
    free,
    step,
    NUM_BYTES: gl.constexpr,
    ALONG_ROWS: gl.constexpr,
):
    """Fetch BLOCK_N keys into the next buffer of a ring, once its last readers have left it.

    ALONG_ROWS: keys follow each other in a row of memory, one row a channel; else each has a row.
    """
    STAGES: gl.constexpr = buffers.shape[0]
    slot = step % STAGES
    mbarrier.wait(free.index(slot), (step // STAGES & 1) ^ 1)
    mbarrier.expect(ready.index(slot), NUM_BYTES)
    if ALONG_ROWS:
        tma.async_copy_global_to_shared(
            descriptor, [plane, 0, start], ready.index(slot), buffers.index(slot)
        )
    else:
        tma.async_copy_global_to_shared(
            descriptor, [plane, start, 0], ready.index(slot), buffers.index(slot)
        )


@gluon.jit
def start_logits(q, k_buffers, k_ready, step, zeros):
    """q times a K tile, not waited for."""
    STAGES: gl.constexpr = k_buffers.shape[0]
    BLOCK_N: gl.constexpr = k_buffers.shape[2]
    BLOCK_D: gl.constexpr = k_buffers.shape[3]
    slot = step % STAGES
    mbarrier.wait(k_ready.index(slot), step // STAGES & 1)
    k = k_buffers.index(slot).reshape([BLOCK_N, BLOCK_D]).permute([1, 0])
    return warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)


@gluon.jit
def over_columns(x):
    """[M, N] as [M, N / LANES, LANES]: the middle lies in the registers of one thread."""
    return x.reshape([x.shape[0], x.shape[1] // _LANES, _LANES])

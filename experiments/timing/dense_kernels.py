"""Dense causal attention by every kernel there is, each by name: what a speed-up is stated over.

Names are those of ``pbs.ops.dense.DENSE_KERNELS``: "flash" is the FlashAttention-2 inside PyTorch,
"fa2", "fa3" and "fa4" are the packages. All get the same causal, grouped-query problem in the same
dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pbs.ops.dense import dense_attention, is_installed
from pbs.registry import unknown

DenseKernel = Callable[..., Tensor]

# Those of a CUDA device that are compared with by default, if they are there.
CUDA_KERNELS = ("flash", "cudnn", "fa2", "fa3", "fa4")
# Kernels that PyTorch's SDPA can be told to run inside somebody else's model.
SDPA_BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def dense_kernels(
    device: torch.device | str, names: Sequence[str] | None = None
) -> dict[str, DenseKernel]:
    """Kernels to compare with, callable as ``kernel(q, k, v, scale=...)``.

    Args:
        device: where; a CPU has "cpu".
        names: which; default all of ``CUDA_KERNELS`` whose package is installed.

    Raises:
        ValueError: a name that this device or installation does not have.
    """
    valid = ["cpu"]
    if torch.device(device).type == "cuda":
        valid = [name for name in CUDA_KERNELS if is_installed(name)]
    for name in names or ():
        if name not in valid:
            raise ValueError(unknown(f"dense kernel of device {device}:", name, valid))
    return {name: partial(dense_attention, kernel=name) for name in names or valid}


def dense_backend(name: str) -> AbstractContextManager[Any]:
    """Inside, PyTorch's SDPA runs the named kernel ("flash" or "cudnn"; "cpu" changes nothing).

    Raises:
        ValueError: an unknown name.
    """
    if name == "cpu":
        return nullcontext()
    if name not in SDPA_BACKENDS:
        raise ValueError(unknown("SDPA kernel", name, list(SDPA_BACKENDS)))
    return sdpa_kernel([SDPA_BACKENDS[name]])

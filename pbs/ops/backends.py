"""Which module carries out an operator."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from torch import Tensor

BACKENDS = ("auto", "reference", "triton")


def backend_module(op: str, backend: str, x: Tensor) -> ModuleType:
    """The module of an operator's backend, imported when it is first asked for.

    Args:
        op: the operator's package in ``pbs.ops``.
        backend: "auto" (Triton on a CUDA device, else the reference), "reference" or "triton".
        x: a tensor of the call.

    Raises:
        ValueError: another backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; valid: {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = "triton" if x.is_cuda else "reference"
    return import_module(f"pbs.ops.{op}.{backend}")

"""Attention as one node of a compiled graph, so that ``torch.compile`` never looks inside.

A method decides in Python what its kernels do; the compiler sees an operator with known shapes.
Under CUDA graphs the recorded launches are replayed and no Python runs: recorders and reports then
count what was captured, not the replays. Where a gradient is needed the call stays outside of the
graph, since the operator has none: it is then computed, or refused, as in a program not compiled.

Legend: see :mod:`pbs.ops.grid`.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_HANDLE = "_pbs_handle"
_owners: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = itertools.count()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def handle_of(owner: Any) -> int:
    """A number by which operators find an object; a copy of an object gets its own."""
    handle = owner.__dict__.get(_HANDLE)
    if handle is None or _owners.get(handle) is not owner:
        handle = next(_numbers)
        owner.__dict__[_HANDLE] = handle
        _owners[handle] = owner
    return handle


def owner_of(handle: int) -> Any:
    """The object with this handle.

    Raises:
        RuntimeError: it is gone, or belongs to another process.
    """
    owner = _owners.get(handle)
    if owner is None:
        raise RuntimeError(
            "a compiled graph calls an attention method or layer that no longer exists; keep the "
            "method or the patched model alive as long as its compiled form, or compile again"
        )
    return owner


@torch.compiler.disable(  # type: ignore[untyped-decorator, unused-ignore]
    reason="pbs attention with gradients runs outside of the compiled graph: compile without "
    "fullgraph=True, or run inside torch.inference_mode()"
)
def outside(owner: Any, *tensors: Tensor, **settings: Any) -> Any:
    """Call an object from a compiled program, by a break of the graph."""
    return owner(*tensors, **settings)


@torch.library.custom_op("pbs::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, method: int, scale: float | None, layer_idx: int | None
) -> Tensor:
    """A method's call as an operator.

    Args:
        q: ``[Z, Hq, Nq, D]``.
        k: ``[Z, Hkv, Nk, D]``.
        v: ``[Z, Hkv, Nk, D]``.
        method: :func:`handle_of` the method.
        scale: factor of the logits; None: 1 / sqrt(D).
        layer_idx: for methods with settings per layer.

    Returns:
        ``[Z, Hq, Nq, D]``, contiguous.
    """
    out: Tensor = owner_of(method)(q, k, v, scale=scale, layer_idx=layer_idx)
    return out.contiguous()


@attention.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)

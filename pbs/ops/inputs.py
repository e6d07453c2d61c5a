"""Checks of what users pass to the ops and methods."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_attention_inputs(q: Tensor, k: Tensor, v: Tensor | None = None) -> None:
    """Refuse tensors that no attention can be computed on.

    Raises:
        ValueError: shapes or devices do not fit each other.
        TypeError: dtypes differ or are not floating point, or something is no dense tensor.
    """
    named = {"q": q, "k": k} if v is None else {"q": q, "k": k, "v": v}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            kind = tensor.layout if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"expected {name} as a dense torch tensor, got {kind}")
        if tensor.ndim != 4:
            raise ValueError(
                f"expected {name} [Z, H, N, D] with four dimensions, got shape "
                f"{tuple(tensor.shape)}; transpose or unsqueeze it"
            )
        if 0 in tensor.shape:
            raise ValueError(f"{name} is empty: got shape {tuple(tensor.shape)}")
        if tensor.device != q.device:
            raise ValueError(
                f"q, k and v must lie on one device, got {name} on {tensor.device} and q on "
                f"{q.device}"
            )
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"expected {name} in fp32, bf16, fp16 or fp64, got {tensor.dtype}")
        if tensor.dtype != q.dtype:
            raise TypeError(
                f"q, k and v must have one dtype, got {name} {tensor.dtype} and q {q.dtype}"
            )
        if tensor.shape[0] != q.shape[0]:
            raise ValueError(
                f"q, k and v must have one batch size, got {name} with {tensor.shape[0]} and q "
                f"with {q.shape[0]}"
            )
        if tensor.shape[3] != q.shape[3]:
            raise ValueError(
                f"q, k and v must have one head dim, got {name} with {tensor.shape[3]} and q with "
                f"{q.shape[3]}"
            )
    if v is not None and v.shape != k.shape:
        raise ValueError(f"expected v shaped like k {tuple(k.shape)}, got {tuple(v.shape)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"the number of query heads must be a multiple of the key heads, got {q.shape[1]} and "
            f"{k.shape[1]}"
        )
    if q.shape[2] > k.shape[2]:
        raise ValueError(
            f"more queries than keys: got {q.shape[2]} and {k.shape[2]}; keys must include the "
            "queries' own tokens"
        )


def as_given(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast lets fp32 be fp32, on this tensor's device.

    Scores, softmax and sums are in fp32 on purpose; autocast would round them, and change what is
    selected.
    """
    if not is_autocast(tensor):
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def is_autocast(tensor: Tensor) -> bool:
    """Whether autocast is on for this tensor's device."""
    kind = tensor.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd, backward or forward, follows what is computed from these tensors."""
    return any(_is_followed(tensor) for tensor in tensors)


def refuse_gradient(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse tensors whose gradient a kernel without a backward pass would lose.

    Raises:
        NotImplementedError: grad mode is on and one of them requires a gradient.
    """
    names = [name for name, x in zip("qkv", (q, k, v), strict=True) if _is_followed(x)]
    if names:
        raise NotImplementedError(
            "the block-sparse kernels compute no gradients, and grad mode is on while "
            f"{', '.join(names)} {'requires' if len(names) == 1 else 'require'} one: call them "
            "inside torch.inference_mode() or torch.no_grad(), or with backend='reference', whose "
            "gradients are right (it needs N x N memory)"
        )


def _is_followed(tensor: Tensor) -> bool:
    if torch.is_grad_enabled() and tensor.requires_grad:
        return True
    return forward_ad.unpack_dual(tensor).tangent is not None

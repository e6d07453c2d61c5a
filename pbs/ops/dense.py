"""Dense causal attention, bottom-right aligned, never with an N x N mask.

Through PyTorch's SDPA or a flash-attention package; which kernel runs is chosen and named here.

Legend: see :mod:`pbs.ops.grid`.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from pbs.checks import check_choice
from pbs.ops.inputs import as_given

# "flash", "cudnn", "efficient" and "math" are SDPA's ("flash" is FlashAttention-2), "fa2", "fa3"
# and "fa4" the flash-attention packages, "cpu" PyTorch's CPU kernel.
DENSE_KERNELS = ("auto", "fa4", "fa3", "fa2", "cudnn", "flash", "efficient", "math", "cpu")
# The modules that hold `flash_attn_func`; those of 2 and 4 share a parent.
_MODULES = {
    "fa2": "flash_attn.flash_attn_interface",
    "fa3": "flash_attn_interface",
    "fa4": "flash_attn.cute",
}
_PACKAGES = {
    "fa2": "flash-attn",
    "fa3": "flash-attn 3 (its folder hopper/, or the package tokenspeed-fa3)",
    "fa4": "flash-attn-4",
}
# Fastest first, as measured on H100s in three runs, 32/8 heads of 128, at 8192, 32768 and 131072
# tokens: fa3 0.75, 11.5, 209 ms, fa4 0.79, 11.7, 221, cudnn 0.92, 13.2, 252, flash 1.7, 25.5, 449.
_FASTEST_FIRST = ("fa3", "fa4", "cudnn", "flash", "efficient")
_SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# Query rows per chunk where a mask must be written out: 512 x 128K booleans are 64 MB.
CHUNK_ROWS = 512
# fp32 logits per chunk where SDPA cannot be used: 64 M are 256 MB.
CHUNK_LOGITS = 1 << 26


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kernel: str = "auto",
) -> Tensor:
    """softmax(q kᵀ scale) v, causal and aligned bottom-right; options of special layers.

    Args:
        q: ``[Z, Hq, Nq, D]``.
        k: ``[Z, Hkv, Nk, D]``, Nk >= Nq, Hq a multiple of Hkv.
        v: ``[Z, Hkv, Nk, D]``.
        scale: factor of the logits.
        sliding_window: a query sees only the last this many keys, itself included.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        sinks: per-head logit that takes part in the softmax without a value, ``[Hq]``.
        kernel: one of ``DENSE_KERNELS``; "auto" takes the fastest that supports the case. The
            options of special layers have one implementation, whatever the kernel.

    Returns:
        ``[Z, Hq, Nq, D]`` in q's dtype, also under autocast.

    Raises:
        ValueError: unknown kernel.
        ImportError: the kernel's package is not installed.
        NotImplementedError: the named kernel does not support this case.
    """
    num_keys = k.shape[2]
    if sliding_window is not None and sliding_window >= num_keys:
        sliding_window = None
    with as_given(q):
        if softcap is None and sinks is None and sliding_window is None:
            return _run_kernel(choose_dense_kernel(kernel, q, k, v), q, k, v, scale)
        return _chunked_attention(
            q, k, v, scale=scale, sliding_window=sliding_window, softcap=softcap, sinks=sinks
        )


def choose_dense_kernel(kernel: str, q: Tensor, k: Tensor, v: Tensor | None = None) -> str:
    """The kernel that :func:`dense_attention` runs on these tensors without special options.

    Args:
        kernel: as asked for.
        q: ``[Z, Hq, Nq, D]``.
        k: ``[Z, Hkv, Nk, D]``.
        v: ``[Z, Hkv, Nk, D]``, if it may be all that requires a gradient.

    Returns:
        A name of ``DENSE_KERNELS`` other than "auto"; "auto" prefers, on a CUDA device, fa3, fa4,
        cudnn, flash, efficient, math, and "cpu" on a CPU.

    Raises:
        ValueError: unknown kernel.
        ImportError: the kernel's package is not installed.
        NotImplementedError: the named kernel does not support this case.
    """
    check_choice(kernel, DENSE_KERNELS, name="dense kernel")
    is_asked = any(x is not None and x.requires_grad for x in (q, k, v))

    def has_gradient(name: str) -> bool:
        return not is_asked or _has_backward(name)

    if kernel == "auto":
        candidates = _FASTEST_FIRST if q.is_cuda else ("cpu",)
        return next(
            (name for name in candidates if _supports(name, q, k) and has_gradient(name)), "math"
        )
    if not is_installed(kernel):
        raise ImportError(f"dense kernel {kernel!r} needs {_PACKAGES[kernel]}; install it")
    if not _supports(kernel, q, k):
        raise NotImplementedError(
            f"dense kernel {kernel!r} does not support q {tuple(q.shape)}, k {tuple(k.shape)}, "
            f"{q.dtype} on {q.device}; kernel='auto' takes the fastest that does"
        )
    if not has_gradient(kernel):
        raise NotImplementedError(
            f"dense kernel {kernel!r} got tensors that require a gradient, and this build "
            "has no backward pass; kernel='auto' takes the fastest that has one"
        )
    return kernel


def _has_backward(kernel: str) -> bool:
    """Whether a kernel has gradients; builds of FlashAttention-3 say what they leave out."""
    if kernel != "fa3":
        return True
    try:
        flags = import_module("flash_attn_config").CONFIG["build_flags"]
    except ImportError:
        return True
    return not flags.get("FLASHATTENTION_DISABLE_BACKWARD", False)


@cache
def is_installed(kernel: str) -> bool:
    """Whether the package of a dense kernel is there; those of PyTorch always are."""
    module = _MODULES.get(kernel)
    if module is None:
        return True
    parent = module.partition(".")[0]
    return find_spec(parent) is not None and find_spec(module) is not None


def _supports(kernel: str, q: Tensor, k: Tensor) -> bool:
    """Whether a kernel can run causal attention on these tensors."""
    if kernel == "math":
        return True
    if kernel == "cpu" or not q.is_cuda:
        return kernel == "cpu" and not q.is_cuda
    if kernel in _MODULES:
        # FlashAttention-4 is written for sm_90 and later, with larger heads on some of them only;
        # FlashAttention-3 for Hopper.
        major = torch.cuda.get_device_capability(q.device)[0]
        return (
            q.dtype in (torch.float16, torch.bfloat16)
            and q.shape[3] <= (128 if kernel == "fa4" else 256)
            and q.shape[3] % 8 == 0
            and {"fa2": major >= 8, "fa3": major == 9, "fa4": major >= 9}[kernel]
            and is_installed(kernel)
        )
    # SDPA masks from the top left; only its flash kernel has a bottom-right form.
    is_square = q.shape[2] == k.shape[2]
    parameters = torch.backends.cuda.SDPAParams(q, k, k, None, 0.0, is_square, True)
    if kernel == "cudnn":
        return is_square and torch.backends.cuda.can_use_cudnn_attention(parameters)
    if kernel == "flash":
        return torch.backends.cuda.can_use_flash_attention(parameters)
    # The efficient kernel has no groups: it gets each key head once per query head.
    every = k[:, :1].expand(-1, q.shape[1], -1, -1)
    parameters = torch.backends.cuda.SDPAParams(q, every, every, None, 0.0, is_square, False)
    return is_square and torch.backends.cuda.can_use_efficient_attention(parameters)


def _run_kernel(kernel: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention by a kernel that supports the case."""
    if q.shape[2] == 1:  # sees every key: no mask, on any kernel
        return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
    if kernel in _MODULES:
        function = import_module(_MODULES[kernel]).flash_attn_func
        swapped = (x.transpose(1, 2) for x in (q, k, v))
        out = function(*swapped, softmax_scale=scale, causal=True)
        out = out[0] if isinstance(out, tuple) else out
        return out.transpose(1, 2)
    if q.shape[2] != k.shape[2]:
        if kernel == "flash":
            # Imported here: it loads torch's compiler, which `import pbs` must not.
            from torch.nn.attention.bias import causal_lower_right

            bias = causal_lower_right(q.shape[2], k.shape[2])
            return scaled_dot_product_attention(
                q, k, v, attn_mask=bias, scale=scale, enable_gqa=True
            )
        return _chunked_attention(
            q, k, v, scale=scale, sliding_window=None, softcap=None, sinks=None
        )
    if kernel == "efficient":
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    with nullcontext() if kernel == "cpu" else sdpa_kernel(_SDPA[kernel]):
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


def dense_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    visible: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one query per sequence over the visible keys: a decoding step.

    Args:
        q: ``[Z, Hq, 1, D]``.
        k: ``[Z, Hkv, Nk, D]``, Hq a multiple of Hkv.
        v: ``[Z, Hkv, Nk, D]``.
        scale: factor of the logits.
        visible: keys the query may see, bool ``[Z, Nk]``; None: all.
        softcap: see :func:`dense_attention`.
        sinks: see :func:`dense_attention`.

    Returns:
        ``[Z, Hq, 1, D]`` in q's dtype, also under autocast.
    """
    mask = None if visible is None else visible[:, None, None, :]
    with as_given(q):
        if softcap is not None or sinks is not None:
            return _softcapped(q, k, v, mask, scale, softcap, sinks)
        # Heads of one group as query rows: SDPA then needs no GQA flag, which together with a mask
        # would send it to its slowest kernel.
        grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
        out = scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
        return out.reshape(q.shape)


def _chunked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Query chunk by query chunk, over only the keys the chunk can see."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    offset = num_keys - num_queries
    chunk_rows = CHUNK_ROWS
    if softcap is not None or sinks is not None:
        width = num_keys if sliding_window is None else min(num_keys, sliding_window + CHUNK_ROWS)
        chunk_rows = max(1, min(CHUNK_ROWS, CHUNK_LOGITS // (q.shape[0] * q.shape[1] * width)))
    outputs = []
    for start in range(0, num_queries, chunk_rows):
        rows = q[:, :, start : start + chunk_rows]
        first, last = offset + start, offset + start + rows.shape[2]
        begin = 0 if sliding_window is None else max(0, first - sliding_window + 1)
        positions = torch.arange(first, last, device=q.device)[:, None]
        keys = torch.arange(begin, last, device=q.device)[None, :]
        mask = keys <= positions
        if sliding_window is not None:
            mask &= positions - keys < sliding_window
        k_part, v_part = k[:, :, begin:last], v[:, :, begin:last]
        if softcap is None and sinks is None:
            out = scaled_dot_product_attention(
                rows, k_part, v_part, attn_mask=mask, scale=scale, enable_gqa=True
            )
        else:
            out = _softcapped(rows, k_part, v_part, mask, scale, softcap, sinks)
        outputs.append(out)
    return torch.cat(outputs, dim=2)


def _softcapped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Eager fp32 attention with the options SDPA lacks; mask bool ``[.., .., M, Nk]``."""
    heads = (k.shape[1], q.shape[1] // k.shape[1])
    # [Z, Hkv, G, M, D] x [Z, Hkv, 1, D, Nk]: keys and values are not repeated.
    logits = q.unflatten(1, heads).float() @ k.unsqueeze(2).float().transpose(-1, -2) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        mask = mask.unsqueeze(2) if mask.ndim == 4 else mask
        logits = logits.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.float().reshape(1, *heads, 1, 1).expand(*logits.shape[:4], 1)
        logits = torch.cat([logits, column], dim=-1)
    probabilities = logits.softmax(dim=-1)[..., : k.shape[2]]
    return (probabilities @ v.unsqueeze(2).float()).flatten(1, 2).to(q.dtype)

"""The public entry: checks its arguments, then runs one of three backends."""

from __future__ import annotations

from enum import Enum
from importlib import import_module
from typing import Any

from torch import Tensor

from pbs.checks import check_choice
from pbs.ops.block_sparse_attention.common import AS_GIVEN, FP8, PRECISIONS
from pbs.ops.inputs import as_given, check_attention_inputs, refuse_gradient
from pbs.ops.plan import AttentionPlan
from pbs.ops.stages import stage


class Backend(str, Enum):
    """Who computes the plan.

    AUTO picks CPU for CPU tensors, and for CUDA tensors HOPPER where it can run the plan (an H100,
    16-bit dtypes, whole tiles of at least 128 queries), else TRITON; it never falls back further.
    To compare plans of both kinds by one kernel, ask for TRITON. REFERENCE is plain eager PyTorch
    with N x N memory; it defines what is right, and is the only one with gradients.
    """

    AUTO = "auto"
    REFERENCE = "reference"
    CPU = "cpu"
    TRITON = "triton"
    HOPPER = "hopper"


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    backend: Backend | str = Backend.AUTO,
    precision: str = AS_GIVEN,
) -> Tensor:
    """One softmax per query over exactly the keys the plan names.

    Args:
        q: ``[Z, Hq, Nq, D]``, fp32, bf16 or fp16.
        k: ``[Z, Hkv, Nk, D]`` in natural order, Hq a multiple of Hkv.
        v: ``[Z, Hkv, Nk, D]`` in natural order.
        plan: made for these shapes, on q's device.
        scale: factor of the logits; default 1 / sqrt(D).
        backend: see :class:`Backend`.
        precision: of both products. "as_given": of the tensors' dtype. "fp8": q, k and v are copied
            into eight bits (e4m3: q with a scale for every 128 rows, k, less the mean of its head,
            for every 128 keys, both rotated, v for every channel), weights are rounded to eight
            bits, sums stay fp32. Runs on a Hopper GPU, with tiles of 128 or more, head dims that
            are multiples of 16 to 128, and plans without columns, moved queries or unaligned
            windows; REFERENCE emulates it anywhere. Source: FlashAttention-3, arXiv 2407.08608,
            section 3.3.

    Returns:
        ``[Z, Hq, Nq, D]`` in q's dtype, also under autocast; zeros for a query without keys. A key
        or value that is not finite changes no query that does not see it, except on the Hopper
        kernel: there a value that is not finite reaches all rows of a query tile that computes it
        in a window.

    Raises:
        ValueError: shapes, devices or the plan do not fit, or the name of the backend or of the
            precision is unknown.
        TypeError: dtypes differ or are not floating point.
        NotImplementedError: no backend for q's device, or the named backend cannot run there; grad
            mode is on, q, k or v requires a gradient, and the backend is not REFERENCE.

    Source: arXiv 2510.21270, section 3.3; the loop over tiles is FlashAttention-2's.
    """
    check_attention_inputs(q, k, v)
    grid = plan.grid
    if (grid.num_queries, grid.num_keys) != (q.shape[2], k.shape[2]) or (
        plan.batch_size,
        plan.num_heads,
    ) != (q.shape[0], q.shape[1]):
        raise ValueError(
            f"the plan is for Z={plan.batch_size}, Hq={plan.num_heads}, Nq={grid.num_queries}, "
            f"Nk={grid.num_keys}; got q {tuple(q.shape)} and k {tuple(k.shape)}"
        )
    if plan.device != q.device:
        raise ValueError(f"the plan lies on {plan.device}, q on {q.device}; move one of them")
    if scale is None:
        scale = q.shape[3] ** -0.5
    module_name, options = _resolve(backend, q.device.type)
    check_choice(precision, PRECISIONS, name="precision")
    if precision == FP8:
        _check_fp8(module_name, options, q.device.type)
        options = {**options, "precision": precision}
    if module_name != Backend.REFERENCE.value:
        refuse_gradient(q, k, v)
    # Imported when used: a machine without Triton, or without need of it, never loads it.
    module = import_module(f"pbs.ops.block_sparse_attention.{module_name}")
    with stage("attention"), as_given(q):
        out: Tensor = module.block_sparse_attention(q, k, v, plan, scale=scale, **options)
    return out


def _check_fp8(module_name: str, options: dict[str, Any], device_type: str) -> None:
    """Refuse backends that have no eight-bit products."""
    if module_name == Backend.CPU.value or options.get("uses_hopper") is False:
        raise NotImplementedError(
            f"precision='fp8' has no kernel on {device_type} by this backend: it needs 'hopper' on "
            "an H100 or H200; backend='reference' emulates it"
        )


def _resolve(backend: Backend | str, device_type: str) -> tuple[str, dict[str, Any]]:
    """The module to run, and what to tell it."""
    names = [member.value for member in Backend]
    if backend not in names:
        raise ValueError(f"unknown backend {backend!r}; valid: {', '.join(names)}")
    backend = Backend(backend)
    if backend is Backend.AUTO:
        automatic = {"cuda": Backend.TRITON, "cpu": Backend.CPU}
        if device_type not in automatic:
            raise NotImplementedError(
                f"no block-sparse kernel for device {device_type!r}; expected cuda or cpu, or ask "
                "for backend='reference'"
            )
        return automatic[device_type].value, {}
    if backend is Backend.CPU and device_type != "cpu":
        raise NotImplementedError(f"backend 'cpu' got tensors on {device_type!r}; use 'triton'")
    if backend in (Backend.TRITON, Backend.HOPPER):
        return Backend.TRITON.value, {"uses_hopper": backend is Backend.HOPPER}
    return backend.value, {}

"""Measured error budgets instead of guessed tolerances."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_budget(
    actual: Tensor,
    low_precision_reference: Tensor,
    exact_fp64: Tensor,
    *,
    factor: float = 2.0,
    slack: float | None = None,
) -> None:
    """Fail if ``actual`` errs more than ``factor`` times as much as an eager reference does.

    Both are measured against the exact result, once by the largest error (a wrong element) and
    once by the root mean square (a drift everywhere); both must stay within
    ``factor * reference error + slack``.

    Args:
        actual: what is tested, any floating dtype.
        low_precision_reference: the readable computation in the same dtype and from the same
            inputs, of the same shape.
        exact_fp64: the result in fp64 from the same (already rounded) inputs.
        factor: how many times the reference's error is allowed.
        slack: allowed on top; default one rounding band: eps of ``actual``'s dtype times the
            largest (or root mean square) exact value.

    Raises:
        AssertionError: outside the budget, or a NaN or infinity in ``actual``.
        ValueError: shapes differ, or the two references are not finite.
        TypeError: ``exact_fp64`` is not fp64, or the reference has another dtype than ``actual``.

    Source: the idea of ``assert_matches_low_precision_reference`` in meta-pytorch/attention-gym.
    """
    if not actual.shape == low_precision_reference.shape == exact_fp64.shape:
        raise ValueError(
            f"expected three tensors of one shape, got {tuple(actual.shape)}, "
            f"{tuple(low_precision_reference.shape)} and {tuple(exact_fp64.shape)}"
        )
    if exact_fp64.dtype != torch.float64:
        raise TypeError(f"expected the exact result in fp64, got {exact_fp64.dtype}")
    if actual.dtype != low_precision_reference.dtype:
        raise TypeError(
            f"expected the reference in {actual.dtype} like the tested tensor, got "
            f"{low_precision_reference.dtype}"
        )
    exact = exact_fp64.detach().cpu()
    reference = low_precision_reference.detach().cpu().double()
    if not bool(exact.isfinite().all() and reference.isfinite().all()):
        raise ValueError("the reference or the exact result is not finite; check the inputs")
    tested = actual.detach().cpu().double()
    num_bad = int((~tested.isfinite()).sum())
    if num_bad:
        raise AssertionError(f"{num_bad} of {tested.numel()} elements are NaN or infinite")
    eps = torch.finfo(actual.dtype).eps
    failures = []
    for name, measure in (("largest", _largest), ("root mean square", _root_mean_square)):
        band = eps * measure(exact) if slack is None else slack
        error, reference_error = measure(tested - exact), measure(reference - exact)
        budget = factor * reference_error + band
        if error > budget:
            failures.append(
                f"{name} error {error:.3e} exceeds {budget:.3e} = {factor:g} x "
                f"{reference_error:.3e} (error of the {actual.dtype} reference) + {band:.3e}"
            )
    if failures:
        worst = int((tested - exact).abs().argmax())
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), exact.shape))
        raise AssertionError("; ".join(failures) + f"; largest error at {place}")


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _root_mean_square(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0

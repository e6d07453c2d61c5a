"""The error budget passes what is as good as eager code and fails what is not."""

import pytest
import torch

from pbs.testing import assert_within_budget


def products(dtype):
    """A matrix product in a low precision by two ways, and in fp64."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(64, 256, generator=generator).to(dtype)
    b = torch.randn(256, 32, generator=generator).to(dtype)
    exact = a.double() @ b.double()
    halves = (a[:, :128].float() @ b[:128].float()) + (a[:, 128:].float() @ b[128:].float())
    return halves.to(dtype), (a.float() @ b.float()).to(dtype), exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_another_order_of_summing_is_within_the_budget(dtype):
    assert_within_budget(*products(dtype))


def test_the_message_shows_both_errors_and_the_place():
    actual, reference, exact = products(torch.bfloat16)
    actual[3, 5] += 4
    with pytest.raises(
        AssertionError, match=r"largest error .* exceeds .* = 2 x .*bfloat16"
    ) as info:
        assert_within_budget(actual, reference, exact)
    assert "(3, 5)" in str(info.value)


def test_a_drift_everywhere_is_found_by_the_mean():
    """No element leaves the band of the largest error, all of them together do."""
    exact = torch.ones(1000, dtype=torch.float64)
    exact[0] = 100.0
    reference = exact.float()
    reference[0] += 0.05
    actual = exact.float() + 0.05
    with pytest.raises(AssertionError, match=r"^root mean square error"):
        assert_within_budget(actual, reference, exact)


def test_slack_and_factor_widen_the_budget():
    exact = torch.ones(10, dtype=torch.float64)
    reference, actual = exact.float(), exact.float() + 0.125
    with pytest.raises(AssertionError):
        assert_within_budget(actual, reference, exact)
    assert_within_budget(actual, reference, exact, slack=0.125)
    reference = reference - 0.0625
    assert_within_budget(actual, reference, exact, slack=0.0)
    with pytest.raises(AssertionError):
        assert_within_budget(actual, reference, exact, factor=1.5, slack=0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_fail(value):
    actual, reference, exact = products(torch.float16)
    actual[0, 0] = value
    with pytest.raises(AssertionError, match="1 of 2048 elements are NaN or infinite"):
        assert_within_budget(actual, reference, exact)


def test_unusable_references_are_refused():
    actual, reference, exact = products(torch.bfloat16)
    with pytest.raises(ValueError, match="one shape"):
        assert_within_budget(actual[:1], reference, exact)
    with pytest.raises(TypeError, match="fp64"):
        assert_within_budget(actual, reference, exact.float())
    with pytest.raises(TypeError, match="like the tested tensor"):
        assert_within_budget(actual, reference.float(), exact)
    with pytest.raises(ValueError, match="not finite"):
        assert_within_budget(actual, reference * float("nan"), exact)

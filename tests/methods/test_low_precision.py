"""What a method selects depends on the values of q and k, not on the dtype that holds them."""

import pytest
import torch

from pbs.testing import make_qkv
from tests.methods.cases import CASES, build

HEAD_DIM = 32
# The factor of the logits makes all three as sharp as attention is.
KINDS = {
    "plain": (1.0, 0.0, HEAD_DIM**-0.5),
    # Sums over many dims that differ little: their rounding to 16 bits decides.
    "common mean": (1.0, 8.0, HEAD_DIM**-0.5),
    # Unscaled sums over stride x D pass 65504, the largest number of fp16.
    "large": (100.0, 0.0, HEAD_DIM**-0.5 * 1e-4),
}


def inputs(kind, dtype):
    factor, mean, scale = KINDS[kind]
    q, k, _ = make_qkv(1, 4, 2, 300, HEAD_DIM, structure="mixed")
    return (q * factor + mean).to(dtype), (k * factor + mean).to(dtype), scale


def assert_same_plan(plan, expected):
    assert torch.equal(plan.density(), expected.density())
    assert torch.equal(plan.token_mask(), expected.token_mask())
    assert torch.equal(plan.key_order(), expected.key_order())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_plan_of_16_bit_inputs_is_that_of_the_same_numbers_in_fp32(case, kind, dtype):
    q, k, scale = inputs(kind, dtype)
    method = build(case)
    assert_same_plan(method.plan(q, k, scale=scale), method.plan(q.float(), k.float(), scale=scale))


@pytest.mark.parametrize("case", CASES)
def test_autocast_does_not_round_the_scores(case):
    q, k, scale = inputs("common mean", torch.bfloat16)
    plans = []
    for enabled in (False, True):
        method = build(case)
        method.recorder = lambda record: plans.append(record.plan)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            method(q, k, k, scale=scale)
    assert_same_plan(plans[1], plans[0])


def test_autocast_does_not_round_the_reference_backend():
    q, k, v = make_qkv(1, 4, 2, 100, HEAD_DIM)
    method = build("pbs", backend="reference")
    expected = method(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(method(q, k, v), expected)

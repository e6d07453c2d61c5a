"""``precision`` of a method: eight bits where asked, refused where there are none, gated."""

from dataclasses import replace

import pytest
import torch

from pbs import block_sparse_attention, build_method
from pbs.testing import make_qkv
from tests.methods.cases import CASES, build


@pytest.mark.parametrize("case", sorted(CASES))
def test_a_method_computes_its_plan_in_eight_bits(case):
    q, k, v = make_qkv(2, 4, 2, 300, 32, structure="mixed")
    method = build(case)
    plan = method.plan(q, k)
    if plan.is_dense and case.startswith("flash"):
        with pytest.raises(ValueError, match="dense attention runs as given"):
            replace(method, precision="fp8")
        return
    out = replace(method, precision="fp8", backend="reference")(q, k, v)
    expected = block_sparse_attention(q, k, v, plan, backend="reference", precision="fp8")
    torch.testing.assert_close(out, expected)
    assert not torch.equal(out, block_sparse_attention(q, k, v, plan, backend="reference"))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_backends_without_it_are_refused_at_once(backend):
    with pytest.raises(ValueError, match="has no kernel on backend"):
        build_method("pbs", precision="fp8", backend=backend)


def test_a_call_that_cannot_run_it_is_refused():
    q, k, v = make_qkv(1, 2, 1, 600, 32)
    with pytest.raises(NotImplementedError, match="'reference' emulates"):
        build_method("pbs", precision="fp8")(q, k, v)


def test_unknown_precisions_name_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'fp8'"):
        build_method("pbs", precision="fp4")

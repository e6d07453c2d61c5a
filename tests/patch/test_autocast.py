"""Patched models and methods under autocast: as the model's own attention, scores in fp32."""

import warnings

import pytest
import torch

from pbs import block_sparse_attention, build_method
from pbs.ops.dense import dense_attention
from pbs.patch.huggingface import apply_patch_with_prefill, get_patch
from pbs.testing import make_qkv
from tests.methods.cases import CASES, build
from tests.patch.models import CONFIGS, make_latent, make_model, random_ids

LOW = [torch.bfloat16, torch.float16]


# All of their layers are special, hence dense.
ALL_DENSE = {"mistral_sliding", "gemma2", "gpt_oss"}


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def autocast(dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype)


def make(name):
    return make_latent() if name == "deepseek_v3" else make_model(name)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", [*CONFIGS, "deepseek_v3"])
def test_patched_models_are_as_near_as_their_own_attention(name, dtype):
    model, ids = make(name), random_ids(2, 150)
    exact = model(ids).logits.double()

    def error():
        with autocast(dtype):
            cache = model(ids[:, :149], use_cache=True)
            last = model(ids[:, 149:], past_key_values=cache.past_key_values).logits
        logits = torch.cat([cache.logits, last], dim=1).double()
        return float((logits - exact).norm() / exact.norm())

    own = error()
    method = build_method("pbs", block_size=16, segment_size=32, threshold=1.0)
    with apply_patch_with_prefill(model, method):
        patched = error()
        assert get_patch(model).report().num_sparse_layers or name in ALL_DENSE
    assert patched <= 2 * own + 1e-3


@pytest.mark.parametrize("case", sorted(CASES))
def test_a_method_computes_what_it_computes_without(case):
    q, k, v = make_qkv(1, 4, 2, 300, 32, structure="mixed")
    method = build(case)
    expected, plan = method(q, k, v), method.plan(q, k)
    heard = []
    method.recorder = heard.append
    with autocast():
        out = method(q, k, v)
    assert out.dtype == q.dtype
    assert torch.equal(heard[0].plan.num_tiles(), plan.num_tiles())
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_a_kernel_computes_what_it_computes_without(backend):
    q, k, v = make_qkv(1, 4, 2, 150, 32, structure="mixed")
    plan = build("pbs").plan(q, k)
    expected = block_sparse_attention(q, k, v, plan, backend=backend)
    with autocast():
        assert torch.equal(block_sparse_attention(q, k, v, plan, backend=backend), expected)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"sinks": torch.zeros(4)}], ids=str)
def test_dense_attention_computes_what_it_computes_without(options):
    q, k, v = make_qkv(1, 4, 2, 150, 32, structure="mixed")
    expected = dense_attention(q, k, v, scale=0.2, **options)
    with autocast():
        out = dense_attention(q, k, v, scale=0.2, **options)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_a_compiled_model_computes_the_same(name):
    torch._dynamo.reset()
    model, ids = make(name), random_ids(2, 150)
    method = build_method("pbs", block_size=16, segment_size=32, threshold=0.5)
    with apply_patch_with_prefill(model, method), autocast():
        expected = model(ids, use_cache=False).logits
        out = torch.compile(model, backend="aot_eager")(ids, use_cache=False).logits
        assert get_patch(model).report().sparse_calls == 4
    error = (out.double() - expected.double()).norm() / expected.double().norm()
    assert error < 0.05  # the compiler rounds elsewhere
    torch._dynamo.reset()


def test_compiled_methods_compute_what_they_compute_without():
    torch._dynamo.reset()
    q, k, v = make_qkv(1, 4, 2, 300, 32, structure="mixed")
    method = build("pbs")
    expected = method(q, k, v) + 1
    fast = torch.compile(lambda q, k, v: method(q, k, v) + 1, backend="aot_eager")
    with autocast():
        assert torch.equal(fast(q, k, v), expected)
    torch._dynamo.reset()

import sys
from types import SimpleNamespace

import pytest
import torch

from pbs import build_method
from pbs.ops import dense
from pbs.ops.dense import CHUNK_ROWS, choose_dense_kernel, dense_attention
from pbs.testing import assert_within_budget, make_qkv
from tests.ops.attention_truth import causal_mask, eager_attention, exact_attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("num_queries", "num_keys"), [(1, 1), (1, 9), (700, 700), (CHUNK_ROWS + 5, 900)]
)
def test_dense_attention_is_aligned_bottom_right(num_queries, num_keys, dtype):
    q, k, v = make_qkv(2, 4, 2, num_keys, 32, num_queries=num_queries, dtype=dtype)
    mask = causal_mask(num_queries, num_keys)
    out = dense_attention(q, k, v, scale=0.2)
    assert_within_budget(
        out, eager_attention(q, k, v, mask, 0.2), exact_attention(q, k, v, mask, 0.2)
    )


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 1, 100, 5000])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_options_of_special_layers_match_their_formulas(softcap, window, has_sinks):
    q, k, v = (x.double() for x in make_qkv(1, 4, 2, 650, 16, num_queries=600))
    sinks = torch.randn(4, dtype=torch.float64) if has_sinks else None
    out = dense_attention(q, k, v, scale=0.3, sliding_window=window, softcap=softcap, sinks=sinks)

    logits = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    mask = causal_mask(600, 650)
    if window:
        distance = (torch.arange(600)[:, None] + 50) - torch.arange(650)
        mask &= distance < window
    weights = logits.masked_fill(~mask, float("-inf")).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp()[None, :, None, None]
    expected = weights / total @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_kernel_is_chosen_and_named():
    q, k, v = make_qkv(1, 2, 1, 100, 16)
    assert choose_dense_kernel("auto", q, k) == "cpu"
    expected = dense_attention(q, k, v, scale=0.25)
    torch.testing.assert_close(dense_attention(q, k, v, scale=0.25, kernel="math"), expected)
    method = build_method("flash", kernel="math")
    assert method.plan(q, k).reason == "dense method (math)"
    torch.testing.assert_close(method(q, k, v, scale=0.25), expected)


@pytest.mark.parametrize(
    ("capability", "chosen", "refused"),
    [((9, 0), "fa3", ()), ((10, 0), "fa4", ("fa3",)), ((8, 0), None, ("fa3", "fa4"))],
)
def test_the_packages_kernels_go_with_their_chips(capability, chosen, refused, monkeypatch):
    monkeypatch.setattr(dense, "is_installed", lambda _: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    q = SimpleNamespace(
        is_cuda=True,
        dtype=torch.bfloat16,
        shape=(1, 4, 8, 128),
        device="cuda:0",
        requires_grad=False,
    )
    if chosen is not None:
        assert choose_dense_kernel("auto", q, q) == chosen
    for kernel in refused:
        with pytest.raises(NotImplementedError, match=f"dense kernel '{kernel}' does not support"):
            choose_dense_kernel(kernel, q, q)
    assert choose_dense_kernel("fa2", q, q) == "fa2"


@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_build_without_a_backward_pass_takes_no_tensors_with_a_gradient(where, monkeypatch):
    config = SimpleNamespace(CONFIG={"build_flags": {"FLASHATTENTION_DISABLE_BACKWARD": True}})
    monkeypatch.setitem(sys.modules, "flash_attn_config", config)
    monkeypatch.setattr(dense, "is_installed", lambda _: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    fixed = {"is_cuda": True, "dtype": torch.bfloat16, "shape": (1, 4, 8, 128), "device": "cuda:0"}
    tensors = [SimpleNamespace(**fixed, requires_grad=index == where) for index in range(3)]
    assert choose_dense_kernel("auto", *tensors) == "fa4"
    with pytest.raises(NotImplementedError, match=r"'fa3' .* this build has no backward pass"):
        choose_dense_kernel("fa3", *tensors)
    config.CONFIG["build_flags"]["FLASHATTENTION_DISABLE_BACKWARD"] = False
    assert choose_dense_kernel("auto", *tensors) == "fa3"


@pytest.mark.parametrize(
    ("kernel", "error", "message"),
    [
        ("flash3", ValueError, "unknown dense kernel 'flash3'. Did you mean 'flash'"),
        ("fa3", ImportError, "needs flash-attn 3"),
        ("fa4", ImportError, "needs flash-attn-4"),
        ("cudnn", NotImplementedError, "does not support q .* on cpu; kernel='auto'"),
    ],
)
def test_kernel_that_cannot_run_is_refused(kernel, error, message):
    q, k, v = make_qkv(1, 2, 1, 100, 16)
    with pytest.raises(error, match=message):
        dense_attention(q, k, v, scale=0.25, kernel=kernel)

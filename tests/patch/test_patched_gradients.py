"""Gradients through patched models: right, or refused in one sentence."""

import warnings

import pytest
import torch

from pbs import build_method
from pbs.patch.huggingface import apply_patch_with_prefill, get_patch
from tests.patch.models import CONFIGS, make_model, random_ids

SENTENCE = r"inference_mode\(\).*backend='reference'"
PLAIN = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma3"]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


def method(**params):
    return build_method("pbs", **{"block_size": 16, "segment_size": 32, "threshold": 0.3, **params})


def gradients(model, run=None, mask=None):
    """Gradient of every parameter of a loss over random tokens, those of padding left out."""
    ids = random_ids(2, 150)
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    model.zero_grad(set_to_none=True)
    run = model if run is None else run
    run(ids, labels=labels, attention_mask=mask, use_cache=False).loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def check_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_sparse_layer_refuses_to_lose_a_gradient(backend, is_training):
    model = make_model("llama").train(is_training)
    with apply_patch_with_prefill(model, method(backend=backend)):
        with pytest.raises(NotImplementedError, match=SENTENCE):
            gradients(model)
        assert get_patch(model).report().sparse_calls == 0


def test_the_sentence_leads_to_no_other_refusal():
    model = make_model("llama").train()
    with apply_patch_with_prefill(model, method()), torch.inference_mode():
        model(random_ids(1, 150))


@pytest.mark.parametrize("trained", ["q_proj", "k_proj", "v_proj", "embed_tokens"])
def test_one_trained_layer_before_attention_is_enough(trained):
    model = make_model("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    with (
        apply_patch_with_prefill(model, method()),
        pytest.raises(NotImplementedError, match=SENTENCE),
    ):
        model(random_ids(1, 150))


def test_what_comes_after_attention_can_be_trained():
    model = make_model("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lm_head" in name)
    with apply_patch_with_prefill(model, method()):
        assert set(gradients(model)) == {"lm_head.weight"}


@pytest.mark.parametrize("name", CONFIGS)
def test_dense_layers_have_the_models_own_gradients(name):
    model = make_model(name)
    expected = gradients(model)
    with apply_patch_with_prefill(model, build_method("flash")):
        check_equal(gradients(model), expected)


@pytest.mark.parametrize("name", PLAIN)
def test_the_reference_has_the_models_own_gradients_at_threshold_one(name):
    model = make_model(name)
    expected = gradients(model)
    with apply_patch_with_prefill(model, method(backend="reference", threshold=1.0)):
        check_equal(gradients(model), expected)
        assert get_patch(model).report().sparse_calls


def test_padding_leaves_dense_gradients_as_they_are():
    model = make_model("llama")
    mask = torch.ones(2, 150, dtype=torch.long)
    mask[1, 110:] = 0
    expected = gradients(model, mask=mask)
    for dense in (build_method("flash"), method(backend="reference", threshold=1.0)):
        with apply_patch_with_prefill(model, dense):
            check_equal(gradients(model, mask=mask), expected)


@pytest.mark.parametrize("is_training", [False, True])
def test_compiled_sparse_layers_refuse_likewise(is_training):
    model = make_model("llama").train(is_training)
    with apply_patch_with_prefill(model, method()):
        fast = torch.compile(model, backend="aot_eager")
        with torch.no_grad():
            fast(random_ids(2, 150), use_cache=False)
        with pytest.raises(NotImplementedError, match=SENTENCE):
            gradients(model, fast)


@pytest.mark.parametrize("kind", ["dense", "reference"])
def test_compiled_dense_layers_and_the_reference_have_gradients(kind):
    model = make_model("llama")
    expected = gradients(model)
    chosen = build_method("flash") if kind == "dense" else method(backend="reference", threshold=1)
    with apply_patch_with_prefill(model, chosen):
        fast = torch.compile(model, backend="aot_eager")
        check_equal(gradients(model, fast), expected)


def test_compiled_sinks_can_be_trained_alone():
    model = make_model("gpt_oss", num_hidden_layers=1, layer_types=["full_attention"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("sinks" in name)
    expected = gradients(model)
    with apply_patch_with_prefill(model, method()):
        check_equal(gradients(model, torch.compile(model, backend="aot_eager")), expected)


def test_checkpointed_layers_refuse_at_the_latest_in_the_backward_pass():
    for reentrant in (False, True):
        model = make_model("llama").train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with (
            apply_patch_with_prefill(model, method()),
            pytest.raises(NotImplementedError, match=SENTENCE),
        ):
            gradients(model)

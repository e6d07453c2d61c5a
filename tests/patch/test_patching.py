"""Patching, restoring, reports, and what is refused."""

import copy
import warnings

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM as AutoModel

from pbs import build_method
from pbs.patch.huggingface import (
    apply_patch_with_prefill,
    get_patch,
    get_permuted_block_sparse_attn_fwd,
    remove_patch,
)
from tests.patch.models import (
    make_model,
    random_ids,
)
from tests.patch.shared import close, densest, layer_calls, sparse


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_returns_the_same_model_and_restores_everything():
    model = make_model("llama", attention="sdpa")
    before, model_class, ids = model.config._attn_implementation, type(model), random_ids(1, 203)
    expected = model(ids).logits
    state = {name: set(vars(module)) for name, module in model.named_modules()}
    with apply_patch_with_prefill(model, sparse()) as patched:
        assert patched is model
        assert isinstance(model, model_class)
        assert model.config._attn_implementation == "pbs"
        assert not torch.equal(model(ids).logits, expected)
    assert torch.equal(model(ids).logits, expected)
    assert type(model) is model_class
    assert model.config._attn_implementation == before == "sdpa"
    assert {name: set(vars(module)) for name, module in model.named_modules()} == state


def test_restores_after_an_exception():
    model = make_model("llama", attention="eager")
    with pytest.raises(ZeroDivisionError), apply_patch_with_prefill(model, sparse()):
        _ = 1 / 0
    assert model.config._attn_implementation == "eager"


def test_without_a_context_manager_remove_patch_restores():
    model = make_model("llama", attention="eager")
    assert apply_patch_with_prefill(model, sparse()) is model
    assert remove_patch(model) is model
    assert model.config._attn_implementation == "eager"
    apply_patch_with_prefill(model, sparse())
    remove_patch(model)


def test_patched_twice_is_an_error():
    model = make_model("llama")
    apply_patch_with_prefill(model, sparse())
    with pytest.raises(ValueError, match=r"already patched; call remove_patch\(model\)"):
        apply_patch_with_prefill(model, sparse())
    with pytest.raises(ValueError, match="already patched"):
        apply_patch_with_prefill(model.model, sparse())


def test_a_patch_is_replaced_if_asked_for():
    model = make_model("llama", attention="eager")
    for method in (sparse(), build_method("meanpool")):
        assert apply_patch_with_prefill(model, method, replace=True) is model
        assert get_patch(model).method is method
        model(random_ids(1, 203))
        assert [layer.was_called for layer in get_patch(model).report().layers] == [True, True]
    remove_patch(model)
    assert model.config._attn_implementation == "eager"
    apply_patch_with_prefill(model, sparse())
    with pytest.raises(ValueError, match="already patched"):
        apply_patch_with_prefill(model.model, sparse(), replace=True)


def test_a_report_prints_as_a_table():
    model = apply_patch_with_prefill(make_model("llama"), sparse(), skip_layers=[1])
    assert (
        str(get_patch(model).report()).splitlines()[1]
        == "    0       0      0        -  never called"
    )
    model(random_ids(1, 203))
    lines = str(get_patch(model).report()).splitlines()
    assert lines[0].split() == ["layer", "sparse", "dense", "density", "dense", "because", "of"]
    assert lines[1].split()[:3] == ["0", "1", "0"]
    assert lines[2].split() == ["1", "0", "1", "1.000", "skipped", "layer", "(1)"]
    assert lines[3].split()[:3] == ["all", "1", "1"]


def test_remove_and_get_need_a_patched_model():
    model = make_model("llama")
    with pytest.raises(ValueError, match=r"not patched; call apply_patch_with_prefill"):
        remove_patch(model)
    with pytest.raises(ValueError, match="not patched"):
        get_patch(model)


def test_saves_the_right_architecture_while_patched(tmp_path):
    model = make_model("llama")
    with apply_patch_with_prefill(model, sparse()):
        model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config._attn_implementation != "pbs"


def test_a_copy_of_a_patched_model_is_patched_on_its_own():
    model = make_model("llama")
    apply_patch_with_prefill(model, sparse())
    other = copy.deepcopy(model)
    other(random_ids(1, 203))
    assert get_patch(model).report().sparse_calls == 0
    assert get_patch(other).report().sparse_calls == 2
    remove_patch(other)
    assert model.config._attn_implementation == "pbs"


def test_attn_implementation_runs_the_default_method(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    ids = random_ids(1, 601)
    model = AutoModel.from_pretrained(tmp_path, attn_implementation="pbs").eval()
    actual = model(ids).logits
    model.set_attn_implementation("sdpa")
    dense = model(ids).logits
    assert not torch.equal(actual, dense)
    with apply_patch_with_prefill(model, build_method("pbs")):
        assert torch.equal(model(ids).logits, actual)
    model.set_attn_implementation("pbs")
    assert torch.equal(model(ids).logits, actual)
    with apply_patch_with_prefill(model, densest()):
        pass
    assert model.config._attn_implementation == "pbs"


def test_a_model_loaded_with_the_name_reports_too(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, attn_implementation="pbs").eval()
    assert get_patch(model).report().uncalled_layers == [0, 1]
    model(random_ids(1, 601))
    patch = get_patch(model)
    assert [layer.sparse_calls for layer in patch.report().layers] == [1, 1]
    assert get_patch(copy.deepcopy(model)).report().sparse_calls == 2
    patch.reset()
    assert get_patch(model).report().sparse_calls == 0
    with pytest.raises(ValueError, match=r"set_attn_implementation\('sdpa'\)"):
        remove_patch(model)


def test_names_of_the_original_build_methods():
    method = get_permuted_block_sparse_attn_fwd(threshold=0.5)
    assert method == build_method("pbs", threshold=0.5)
    with pytest.raises(ValueError, match="Did you mean 'threshold'"):
        get_permuted_block_sparse_attn_fwd(treshold=0.5)


def test_skipped_layers_stay_dense():
    model = make_model("llama")
    ids = random_ids(1, 203)
    with apply_patch_with_prefill(model, sparse(), skip_layers=[1, 1]):
        assert get_patch(model).skip_layers == (1,)
        model(ids)
        layers = layer_calls(model)
    assert layers[0].sparse_calls == 1
    assert layers[1].dense_calls == {"skipped layer": 1}
    expected = model(ids).logits
    with apply_patch_with_prefill(model, sparse(), skip_layers=range(2)):
        close(model(ids).logits, expected)


@pytest.mark.parametrize(
    ("skip_layers", "error", "text"),
    [
        ([2], ValueError, "layer 2, but the model's attention layers are 0, 1"),
        ([-1], ValueError, "layer -1"),
        ([True], TypeError, "integers, got True"),
        (["0"], TypeError, "integers, got '0'"),
        ("0", TypeError, "layer indices, got '0'"),
        (1, TypeError, "layer indices, got 1"),
    ],
)
def test_wrong_skip_layers(skip_layers, error, text):
    model = make_model("llama")
    with pytest.raises(error, match=text):
        apply_patch_with_prefill(model, sparse(), skip_layers=skip_layers)
    assert model.config._attn_implementation == "eager"


def test_report_counts_and_density():
    model = make_model("llama")
    method = sparse()
    densities = []
    method.recorder = lambda record: densities.append(record.plan.density().mean())
    with apply_patch_with_prefill(model, method):
        patch = get_patch(model)
        fresh = patch.report()
        assert fresh.density is None
        assert fresh.uncalled_layers == [0, 1]
        model.generate(random_ids(2, 203), max_new_tokens=3, do_sample=False)
        model(random_ids(1, 30))
        report = patch.report()
        assert patch.method is method
        patch.reset()
        assert patch.report() == fresh
    for index, layer in enumerate(report.layers):
        assert layer.layer_idx == index
        assert layer.sparse_calls == 1
        assert layer.dense_calls == {"decode": 2, "no more keys than segment_size=32": 1}
        # Two sequences in the sparse call, one in the dense one.
        assert layer.density == pytest.approx((2 * float(densities[index]) + 1) / 3)
    assert 0 < report.density < 1
    assert report.num_sparse_layers == 2
    plain = report.to_dict()
    assert plain["dense_calls"] == {"decode": 4, "no more keys than segment_size=32": 2}
    assert plain["layers"][0]["layer_idx"] == 0


def test_the_method_s_recorder_is_kept():
    model, method, heard = make_model("llama"), sparse(), []
    method.recorder = first = heard.append
    with apply_patch_with_prefill(model, method):
        model(random_ids(1, 203))
        method.recorder = second = lambda record: heard.append(record.layer_idx)
        model(random_ids(1, 203))
        assert get_patch(model).report().sparse_calls == 4
    assert method.recorder is second is not first
    assert [item if isinstance(item, int) else item.layer_idx for item in heard] == [0, 1, 0, 1]


def test_one_method_in_two_models_counts_in_each():
    method = sparse()
    first, second = make_model("llama"), make_model("qwen3")
    with apply_patch_with_prefill(first, method), apply_patch_with_prefill(second, method):
        first(random_ids(1, 203))
        assert get_patch(first).report().sparse_calls == 2
        assert get_patch(second).report().uncalled_layers == [0, 1]


def test_dense_method_says_so():
    model = make_model("llama")
    with apply_patch_with_prefill(model, build_method("flash")):
        model(random_ids(1, 203))
        report = get_patch(model).report()
    assert report.dense_calls == {"dense method (cpu)": 2}
    assert report.density == 1
    assert report.num_sparse_layers == 0


@pytest.mark.parametrize(
    ("prefill_fn", "text"),
    [
        (lambda q, k, v: q, "the callable <lambda>"),
        ("pbs", "got 'pbs'"),
        (None, "got NoneType"),
    ],
)
def test_only_methods_are_accepted(prefill_fn, text):
    with pytest.raises(TypeError, match=f"AttentionMethod as prefill_fn, {text}|{text}"):
        apply_patch_with_prefill(make_model("llama"), prefill_fn)


def test_only_transformers_models_are_accepted():
    with pytest.raises(TypeError, match="PreTrainedModel"):
        apply_patch_with_prefill(torch.nn.Linear(2, 2), sparse())


def tiny(config_class, **extra):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
    return config_class(**sizes, **extra)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: AutoModel.from_config(tiny(transformers.BloomConfig)),
            r"h\.0\.self_attention \(BloomAttention\)",
        ),
        (
            lambda: transformers.BertModel(tiny(transformers.BertConfig, intermediate_size=64)),
            r"\(Bert\w*Attention\)",
        ),
        (
            lambda: transformers.T5ForConditionalGeneration(
                transformers.T5Config(
                    d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=99
                )
            ),
            "encoder-decoder",
        ),
        (
            lambda: AutoModel.from_config(
                tiny(transformers.Llama4TextConfig, attention_chunk_size=64, head_dim=16)
            ),
            "chunked attention",
        ),
        (
            lambda: AutoModel.from_config(
                transformers.GPT2Config(
                    n_embd=32, n_layer=1, n_head=4, vocab_size=99, add_cross_attention=True
                )
            ),
            r"crossattention \(GPT2Attention\) is not causal self-attention",
        ),
    ],
    ids=["legacy", "encoder", "encoder-decoder", "chunked", "cross"],
)
def test_unsupported_models_are_refused_unchanged(make, text):
    model = make()
    before = model.config._attn_implementation
    with pytest.raises(NotImplementedError, match=text):
        apply_patch_with_prefill(model, sparse())
    assert model.config._attn_implementation == before


def patched_llama():
    return apply_patch_with_prefill(make_model("llama"), sparse())


def test_packed_sequences_are_refused():
    model, ids = patched_llama(), random_ids(1, 60)
    packed = torch.cat([torch.arange(30), torch.arange(30)])[None]
    with pytest.raises(NotImplementedError, match="packed sequences"):
        model(ids, position_ids=packed, use_cache=False)
    with pytest.raises(NotImplementedError, match="position_ids start again"):
        model(ids, position_ids=packed, attention_mask=torch.ones_like(ids))


def test_padding_between_real_tokens_is_refused():
    mask = torch.ones(1, 60, dtype=torch.long)
    mask[0, 20:30] = 0
    with pytest.raises(NotImplementedError, match="padding between real tokens"):
        patched_llama()(random_ids(1, 60), attention_mask=mask)


def test_virtual_tokens_before_padding_are_told_to_pad_on_the_right():
    """As prompt tuning gives them: ones for the virtual tokens, then the padding on the left."""
    mask = torch.ones(2, 68, dtype=torch.long)
    mask[1, 8:30] = 0
    with pytest.raises(NotImplementedError, match=r"prompt tuning.*: pad on the right"):
        patched_llama()(random_ids(2, 68), attention_mask=mask)
    padded_on_the_right = mask.sort(dim=1, descending=True).values
    patched_llama()(random_ids(2, 68), attention_mask=padded_on_the_right)


def test_custom_masks_are_refused():
    with pytest.raises(NotImplementedError, match=r"attention mask of shape \(1, 1, 60, 60\)"):
        patched_llama()(random_ids(1, 60), attention_mask=torch.zeros(1, 1, 60, 60))


def test_output_attentions_is_refused():
    with pytest.raises((NotImplementedError, ValueError), match="eager"):
        patched_llama()(random_ids(1, 60), output_attentions=True)

"""The plug-in against the models' own attention, on tiny random models."""

import copy
import warnings

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionMaskInterface, StaticCache
from transformers import AutoModelForCausalLM as AutoModel

from pbs import AttentionPlan, Geometry, build_method
from pbs.patch.huggingface import (
    PaddingMask,
    apply_patch_with_prefill,
    attention_forward,
    get_patch,
    get_permuted_block_sparse_attn_fwd,
    padding_mask,
    remove_patch,
)
from tests.patch.models import (
    CONFIGS,
    REASONS,
    SPARSE_LAYERS,
    WINDOW,
    make_latent,
    make_model,
    positions_of,
    random_ids,
)

IS_V4 = transformers.__version__.startswith("4.")
# Measured on these models: fp32 rounding, logits of size 1 to 10.
TOLERANCE = {"rtol": 0.0, "atol": 5e-5}


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def densest():
    """Sparse code path, dense result."""
    return build_method("pbs", block_size=16, segment_size=32, threshold=1.0)


def sparse():
    return build_method("pbs", block_size=16, segment_size=32, threshold=0.3)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def layer_calls(model):
    return {layer.layer_idx: layer for layer in get_patch(model).report().layers}


# Equal to the model's own attention


@pytest.mark.parametrize("name", CONFIGS)
def test_threshold_one_equals_the_models_own_attention(name):
    model = make_model(name)
    ids = random_ids(2, 203)
    expected = model(ids).logits
    with apply_patch_with_prefill(model, densest()) as model:
        close(model(ids).logits, expected)
        close(model(ids, use_cache=False).logits, expected)
        report = get_patch(model).report()
    assert {n.layer_idx for n in report.layers if n.sparse_calls} == SPARSE_LAYERS[name]
    assert set(report.dense_calls) == REASONS.get(name, set())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_sequences_get_their_logits_alone(name, side):
    model = make_model(name)
    lengths = [203, 131, 20]
    ids, mask = random_ids(3, 203), torch.zeros(3, 203, dtype=torch.long)
    spans = []
    for row, length in enumerate(lengths):
        spans.append(slice(203 - length, 203) if side == "left" else slice(0, length))
        mask[row, spans[row]] = 1
    with apply_patch_with_prefill(model, sparse()):
        batch = model(ids, attention_mask=mask, position_ids=positions_of(mask)).logits
        for row, span in enumerate(spans):
            close(batch[row, span], model(ids[row : row + 1, span]).logits[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_in_chunks_attends_to_the_cache(name):
    model = make_model(name)
    ids = random_ids(2, 203)
    expected = model(ids).logits
    with apply_patch_with_prefill(model, densest()):
        cache, parts = None, []
        for start, end in [(0, 30), (30, 150), (150, 202), (202, 203)]:
            out = model(ids[:, start:end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    close(torch.cat(parts, dim=1), expected)


@pytest.mark.parametrize("name", ["llama", "mistral_sliding", "gemma3", "gpt_oss"])
def test_static_cache_with_unwritten_slots(name):
    model = make_model(name)
    ids, mask = random_ids(2, 203), torch.ones(2, 203, dtype=torch.long)
    mask[0, :57] = 0
    positions = positions_of(mask)
    expected = model(ids, attention_mask=mask, position_ids=positions).logits
    with apply_patch_with_prefill(model, densest()):
        cache = StaticCache(config=model.config, max_cache_len=256)
        parts = []
        for start, end in [(0, 120), (120, 180), (180, 202), (202, 203)]:
            extra = {"cache_position": torch.arange(start, end)} if IS_V4 else {}
            out = model(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
                **extra,
            )
            parts.append(out.logits)
    close(torch.cat(parts, dim=1)[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("name", CONFIGS)
def test_generate_gives_the_same_tokens(name):
    model = make_model(name)
    ids, mask = random_ids(2, 150), torch.ones(2, 150, dtype=torch.long)
    mask[1, :61] = 0
    options = {"max_new_tokens": 5, "do_sample": False}

    def two_turns():
        first = model.generate(ids, attention_mask=mask, **options)
        ids2 = torch.cat([first, random_ids(2, 70, seed=1)], dim=1)
        mask2 = torch.cat([mask, torch.ones(2, ids2.shape[1] - 150, dtype=torch.long)], dim=1)
        return first, model.generate(ids2, attention_mask=mask2, **options)

    expected = two_turns()
    with apply_patch_with_prefill(model, densest()):
        actual = two_turns()
        calls = get_patch(model).report().dense_calls["decode"]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert calls == 2 * 2 * 4


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_goes_on_from_a_filled_cache(cache):
    model = make_model("llama")
    ids, mask = random_ids(2, 150), torch.ones(2, 150, dtype=torch.long)
    mask[1, :61] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    extra = {"cache_implementation": "static"} if cache == "static" else {}
    expected = model.generate(ids, attention_mask=mask, **options).sequences
    with apply_patch_with_prefill(model, densest()):
        first = model.generate(ids, attention_mask=mask, **options, **extra)
        assert torch.equal(first.sequences, expected)
        if cache == "static":
            return
        turn = torch.cat([first.sequences, random_ids(2, 70, seed=1)], dim=1)
        longer = torch.cat([mask, torch.ones(2, turn.shape[1] - 150, dtype=torch.long)], dim=1)
        second = model.generate(
            turn, attention_mask=longer, past_key_values=first.past_key_values, **options
        )
    assert torch.equal(
        second.sequences, model.generate(turn, attention_mask=longer, **options).sequences
    )


def test_a_window_no_shorter_than_the_sequence_is_an_ordinary_layer():
    model = make_model("mistral_sliding", sliding_window=203)
    ids = random_ids(1, 203)
    expected = model(ids).logits
    with apply_patch_with_prefill(model, densest()):
        close(model(ids).logits, expected)
        assert get_patch(model).report().num_sparse_layers == 2
        get_patch(model).reset()
        model(random_ids(1, 204))
        assert get_patch(model).report().dense_calls == {"sliding window 203": 2}


def test_narrow_values_of_latent_attention():
    model = make_latent()
    ids = random_ids(1, 150)
    expected = model(ids).logits
    with apply_patch_with_prefill(model, densest()):
        close(model(ids).logits, expected)
        assert get_patch(model).report().num_sparse_layers == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_runs_sparse_on_a_cpu(dtype):
    model = make_model("llama").to(dtype)
    ids = random_ids(1, 203)
    expected = model(ids).logits
    with apply_patch_with_prefill(model, densest()):
        actual = model(ids).logits
        assert get_patch(model).report().num_sparse_layers == 2
    assert actual.dtype == dtype
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < 8 * torch.finfo(dtype).eps


# Putting in and taking out


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


def test_names_of_the_original_build_methods():
    method = get_permuted_block_sparse_attn_fwd(threshold=0.5)
    assert method == build_method("pbs", threshold=0.5)
    with pytest.raises(ValueError, match="Did you mean 'threshold'"):
        get_permuted_block_sparse_attn_fwd(treshold=0.5)


# Layers and reports


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


# Refusals


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


class Attention(torch.nn.Module):
    """Stands for an attention layer in direct calls."""

    layer_idx = 0
    is_causal = True


def call(module=None, mask=None, num_keys=40, num_queries=40, value_dim=16, **kwargs):
    q = torch.randn(2, 4, num_queries, 16)
    k = torch.randn(2, 2, num_keys, 16)
    v = torch.randn(2, 2, num_keys, value_dim)
    return attention_forward(module or Attention().eval(), q, k, v, mask, **kwargs)


def test_direct_call_shape_and_layout():
    out, weights = call()
    assert out.shape == (2, 40, 4, 16)
    assert out.is_contiguous()
    assert weights is None
    assert call(value_dim=8)[0].shape == (2, 40, 4, 8)


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"dropout": 0.1}, NotImplementedError, "dropout 0.1"),
        ({"is_causal": False}, NotImplementedError, "not causal"),
        ({"output_attentions": True}, NotImplementedError, "eager"),
        ({"position_bias": torch.zeros(1)}, NotImplementedError, "'position_bias'"),
        ({"indices": torch.zeros(1)}, NotImplementedError, "'indices'"),
        ({"num_queries": 41}, ValueError, "more queries than keys: got 41 and 40"),
        ({"value_dim": 24}, NotImplementedError, "wider than its keys"),
        ({"mask": torch.ones(2, 39)}, ValueError, r"attention mask \[2, 40\]"),
        (
            {"mask": torch.arange(40).expand(2, -1) < 30},
            NotImplementedError,
            "last 10 of 40 keys",
        ),
    ],
)
def test_direct_calls_that_are_refused(kwargs, error, text):
    with pytest.raises(error, match=text):
        call(**kwargs)


def test_a_layer_and_its_mask_must_agree_on_the_window():
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, 0] = False
    own = padding_mask(2, q_length=40, q_offset=0, kv_length=40, attention_mask=mask)
    with pytest.raises(NotImplementedError, match="sliding window of 8, its mask for none"):
        call(mask=own, sliding_window=8)
    call(mask=own, sliding_window=40)


def test_a_mask_of_another_forward_is_refused():
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, 0] = False
    own = padding_mask(2, q_length=20, q_offset=20, kv_length=40, attention_mask=mask)
    with pytest.raises(ValueError, match="made for 20 queries, got 40"):
        call(mask=own)


def test_a_layer_that_is_not_causal_is_refused():
    module = Attention().eval()
    module.is_causal = False
    with pytest.raises(NotImplementedError, match="Attention is not causal"):
        call(module)


@pytest.mark.parametrize("name", ["bidirectional", "unknown", "chunked", "image"])
def test_masks_that_are_not_plain_causal_are_refused(name):
    from transformers import masking_utils

    function = {
        "bidirectional": getattr(
            masking_utils, "bidirectional_mask_function", lambda b, h, q, k: q >= 0
        ),
        "unknown": lambda b, h, q, k: k <= q,
        "chunked": masking_utils.and_masks(
            masking_utils.causal_mask_function,
            masking_utils.chunked_overlay(16, torch.zeros(1, dtype=torch.long)),
        ),
        "image": masking_utils.or_masks(
            masking_utils.causal_mask_function, lambda b, h, q, k: k < 4
        ),
    }[name]
    with pytest.raises(NotImplementedError, match="this model asks for"):
        padding_mask(1, q_length=40, q_offset=0, kv_length=40, mask_function=function)


# The mask, and memory


def test_nothing_to_mask_is_none():
    ones = torch.ones(2, 40, dtype=torch.bool)
    assert padding_mask(2, q_length=40, q_offset=0, kv_length=40) is None
    assert padding_mask(2, q_length=10, q_offset=30, kv_length=40, attention_mask=ones) is None
    assert padding_mask(2, q_length=1, q_offset=39, kv_length=40, attention_mask=ones) is None
    assert padding_mask(2, cache_position=torch.arange(30, 40), kv_length=40) is None


def test_mask_is_one_row_per_sequence_with_its_geometry():
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, :7] = False
    for placement in (
        {"q_length": 10, "q_offset": 30},
        {"q_length": 10, "q_offset": torch.tensor(30)},
        {"cache_position": torch.arange(30, 40)},
    ):
        own = padding_mask(2, kv_length=48, kv_offset=5, attention_mask=mask, **placement)
        assert own.shape == (2, 48)
        assert own.sum(dim=1).tolist() == [35, 33]
        assert own.key_layout.geometry == Geometry(10, 48, 25, (0, 2), (35, 35))
        assert padding_mask(2, kv_length=48, attention_mask=own) is own


def test_decode_mask_holds_padding_window_and_written_slots():
    from transformers.masking_utils import sliding_window_causal_mask_function as sliding

    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, :17] = False
    own = padding_mask(
        2, q_length=1, q_offset=19, kv_length=32, attention_mask=mask, mask_function=sliding(8)
    )
    assert own.nonzero().tolist() == [[0, s] for s in range(12, 20)] + [
        [1, s] for s in range(17, 20)
    ]


def test_mask_keeps_its_layout_when_moved_and_not_when_changed():
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, 0] = False
    own = padding_mask(2, q_length=40, q_offset=0, kv_length=40, attention_mask=mask)
    for same in (own.to("cpu"), own.to(dtype=torch.bool), own.contiguous(), own.clone()):
        assert isinstance(same, PaddingMask)
        assert same.key_layout is own.key_layout
    for other in (own[:, 1:], ~own, own.float(), own & True):
        assert not isinstance(other, PaddingMask)


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else [result]:
            if isinstance(item, torch.Tensor):
                # Storage, not shape: an expanded view costs nothing.
                size = item.untyped_storage().nbytes() // max(item.element_size(), 1)
                self.largest = max(self.largest, size)
        return result


@pytest.mark.parametrize("padded", [False, True])
def test_prefill_never_makes_a_square_tensor(padded):
    length = 8192
    model = make_model("llama", num_hidden_layers=1, intermediate_size=64, vocab_size=128)
    mask = torch.ones(1, length, dtype=torch.long)
    mask[0, : 100 if padded else 0] = 0
    with apply_patch_with_prefill(model, build_method("pbs", block_size=128, segment_size=256)):
        with LargestTensor() as seen:
            model.model(random_ids(1, length), attention_mask=mask, position_ids=positions_of(mask))
        assert get_patch(model).report().num_sparse_layers == 1
    assert seen.largest < length * length // 2


def test_the_registered_mask_function_is_ours():
    assert AttentionMaskInterface()["pbs"] is padding_mask


def test_a_method_with_a_plan_of_its_own_runs():
    """Subclasses of AttentionMethod need plan() only."""
    from dataclasses import dataclass

    from pbs import AttentionMethod

    @dataclass(kw_only=True)
    class OnlyOwnTile(AttentionMethod):
        def select(self, call):
            grid = call.grid(16)
            none = torch.zeros(*call.q.shape[:2], grid.num_query_tiles, grid.num_key_tiles).bool()
            return AttentionPlan.from_block_mask(none, grid)

    model = make_model("llama")
    with apply_patch_with_prefill(model, OnlyOwnTile()):
        model(random_ids(1, 160))
        assert get_patch(model).report().density == pytest.approx(10 / 55)


def test_example_of_the_original_s_readme(project_root, capsys):
    from pbs_attn.patch.huggingface import (
        apply_patch_with_prefill,
        get_permuted_block_sparse_attn_fwd,
    )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    PATH = str(project_root / "experiments" / "tiny")
    for prompt, is_sparse in (("the river", False), ("the river " * 300, True)):
        model = AutoModelForCausalLM.from_pretrained(
            PATH, torch_dtype=torch.bfloat16, device_map="auto"
        )
        tokenizer = AutoTokenizer.from_pretrained(PATH)
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        model = apply_patch_with_prefill(model, get_permuted_block_sparse_attn_fwd())
        output = model.generate(**inputs, max_new_tokens=30, do_sample=False)
        print(tokenizer.decode(output[0], skip_special_tokens=True))
        assert bool(get_patch(model).report().num_sparse_layers) == is_sparse
        assert capsys.readouterr().out


@pytest.fixture
def project_root():
    from pathlib import Path

    return Path(__file__).resolve().parents[2]


def test_sliding_window_is_computed_at_its_edge():
    """A window of w sees w keys: one less or more would move these logits."""
    model, ids = make_model("mistral_sliding"), random_ids(1, WINDOW + 1)
    expected = model(ids).logits
    with apply_patch_with_prefill(model, densest()):
        close(model(ids).logits, expected)

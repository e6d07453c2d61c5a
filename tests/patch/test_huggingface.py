"""The plug-in against the models' own attention, on tiny random models."""

import warnings

import pytest
import torch
from transformers import StaticCache

from pbs.patch.huggingface import (
    apply_patch_with_prefill,
    get_patch,
)
from tests.patch.models import (
    CONFIGS,
    REASONS,
    SPARSE_LAYERS,
    make_latent,
    make_model,
    positions_of,
    random_ids,
)
from tests.patch.shared import IS_V4, close, densest, sparse


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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

"""Few queries on a filled cache are steps of decoding: dense, and counted as such."""

import warnings
from dataclasses import replace

import pytest
import torch
from transformers import StaticCache

from pbs import Geometry, build_method
from pbs.patch.huggingface import apply_patch_with_prefill, get_patch
from pbs.testing import make_qkv
from tests.methods.cases import CASES, build
from tests.patch.models import REASONS, VOCABULARY, make_model, positions_of, random_ids
from tests.patch.test_huggingface import IS_V4, close

LAYERS = 2


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def sparse(**params):
    return build_method("pbs", **{"block_size": 16, "segment_size": 32, "threshold": 0.3, **params})


def forward_in_parts(model, ids, lengths):
    """Logits of the last part; every part sees the cache of those before."""
    cache, start = None, 0
    for length in lengths:
        out = model(ids[:, start : start + length], past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, start + length
    return out.logits


# The rule


@pytest.mark.parametrize(
    ("params", "num_queries", "is_decode"),
    [
        ({}, 2, True),
        ({}, 127, True),
        ({}, 128, False),
        ({"decode_below": 16}, 15, True),
        ({"decode_below": 16}, 16, False),
        ({"decode_below": 0}, 2, False),
        ({"decode_below": 0}, 1, True),  # a single query in any case
    ],
)
def test_calls_below_the_limit_are_decoding_steps(params, num_queries, is_decode):
    model = apply_patch_with_prefill(make_model("llama"), sparse(**params))
    ids = random_ids(1, 300 + num_queries)
    forward_in_parts(model, ids, [300])
    alone = get_patch(model).report()
    forward_in_parts(model, ids, [300, num_queries])
    report = get_patch(model).report()
    assert report.dense_calls == ({"decode": LAYERS} if is_decode else {})
    assert report.sparse_calls == (2 if is_decode else 3) * LAYERS
    assert (report.density == pytest.approx(alone.density)) == is_decode


def test_a_short_prompt_is_none():
    model = apply_patch_with_prefill(make_model("llama"), sparse())
    model(random_ids(1, 100))
    assert get_patch(model).report().sparse_calls == LAYERS


@pytest.mark.parametrize("num_queries", [2, 5, 10])
def test_several_tokens_at_once_get_what_they_get_one_by_one(num_queries):
    model = apply_patch_with_prefill(make_model("llama"), sparse())
    ids = random_ids(1, 300 + num_queries)
    together = forward_in_parts(model, ids, [300, num_queries])
    one_by_one = forward_in_parts(model, ids, [300] + [1] * num_queries)
    close(together[:, -1:], one_by_one)


@pytest.mark.parametrize("case", sorted(CASES))
def test_it_holds_for_direct_calls_of_every_method(case):
    q, k, v = make_qkv(1, 4, 2, 300, 32, num_queries=40, structure="mixed")
    method, heard = build(case, decode_below=41), []
    method.recorder = heard.append
    out = method(q, k, v)
    assert [(call.plan.is_dense, call.plan.reason) for call in heard] == [(True, "decode")]
    torch.testing.assert_close(out, build(case, densest=True)(q, k, v), rtol=1e-5, atol=1e-5)
    replace(method, decode_below=40)(q, k, v)
    assert heard[-1].plan.reason == "decode"  # a copy has no recorder


def test_each_sequence_of_a_padded_batch_decides_for_itself():
    q, k, v = make_qkv(3, 4, 2, 300, 32, num_queries=200, structure="mixed")
    # New tokens on a cache of 100: 200 and 30; a prompt of 60 without a cache.
    geometry = Geometry(200, 300, 100, (0, 0, 240), (300, 130, 300))
    method, reasons = sparse(), []
    method.recorder = lambda call: reasons.append(call.plan.reason)
    out = method(q, k, v, geometry=geometry)
    assert reasons == ["", "decode", ""]
    torch.testing.assert_close(
        out[1:2, :, :30], method(q[1:2, :, :30], k[1:2, :, :130], v[1:2, :, :130])
    )
    torch.testing.assert_close(out[:1], method(q[:1], k[:1], v[:1]))


@pytest.mark.parametrize("name", ["mistral_sliding", "gemma2", "gpt_oss"])
def test_special_layers_count_them_alike(name):
    model = apply_patch_with_prefill(make_model(name), sparse())
    forward_in_parts(model, random_ids(1, 310), [300, 10])
    calls = get_patch(model).report().dense_calls
    assert set(calls) == REASONS[name] | {"decode"}
    assert calls["decode"] == LAYERS


def test_skipped_layers_count_them_alike():
    model = apply_patch_with_prefill(make_model("llama"), sparse(), skip_layers=[0, 1])
    forward_in_parts(model, random_ids(1, 310), [300, 10])
    assert get_patch(model).report().dense_calls == {"decode": 2, "skipped layer": 2}


def test_padded_skipped_layers_count_each_length():
    model = apply_patch_with_prefill(make_model("llama"), sparse(), skip_layers=[0])
    mask = torch.ones(3, 150, dtype=torch.long)
    mask[1, :70] = 0
    model(random_ids(3, 150), attention_mask=mask, position_ids=positions_of(mask))
    first, second = get_patch(model).report().layers
    assert first.dense_calls == {"skipped layer": 2}
    assert second.sparse_calls == 2


def test_a_static_cache_with_unwritten_slots_is_no_longer_a_cache_than_its_tokens():
    model = apply_patch_with_prefill(make_model("llama"), sparse())
    cache = StaticCache(config=model.config, max_cache_len=400)
    ids = random_ids(1, 110)
    for start, end in ((0, 100), (100, 110)):
        extra = {"cache_position": torch.arange(start, end)} if IS_V4 else {}
        model(ids[:, start:end], past_key_values=cache, **extra)
    report = get_patch(model).report()
    assert report.sparse_calls == LAYERS  # the first call is a short prompt
    assert report.dense_calls == {"decode": LAYERS}


# Generation


def repeating_ids():
    """A prompt whose n-grams come again, so that look-up finds candidates."""
    return random_ids(1, 50).repeat(1, 6)


def generate(model, **options):
    """New tokens, and the report of the patch."""
    model = apply_patch_with_prefill(model, sparse())
    tokens = model.generate(repeating_ids(), max_new_tokens=24, do_sample=False, **options)
    return tokens[0, 300:].tolist(), get_patch(model).report()


def small_assistant():
    """Another model of the same vocabulary: most of its guesses are wrong."""
    return make_model("llama", num_hidden_layers=1)


@pytest.mark.parametrize(
    "options",
    [
        lambda: {"prompt_lookup_num_tokens": 8},
        lambda: {"prompt_lookup_num_tokens": 8, "max_matching_ngram_size": 1},
        lambda: {"assistant_model": small_assistant()},
        lambda: {"assistant_model": make_model("llama")},
    ],
    ids=["lookup", "lookup-1", "assistant", "assistant-same"],
)
def test_same_tokens_and_counts_with_and_without_candidates(options):
    expected, plain = generate(make_model("llama"))
    tokens, report = generate(make_model("llama"), **options())
    assert tokens == expected
    assert max(tokens) < VOCABULARY
    assert report.sparse_calls == plain.sparse_calls == LAYERS
    assert report.density == plain.density
    assert set(report.dense_calls) == {"decode"}


def test_an_assistant_is_worth_its_steps():
    """The dense model itself guesses nearly all: fewer steps than tokens."""
    _, plain = generate(make_model("llama"))
    _, report = generate(make_model("llama"), assistant_model=make_model("llama"))
    assert report.dense_calls["decode"] < plain.dense_calls["decode"]


def test_prefill_in_chunks_runs_sparse_but_for_a_short_last_one():
    model = apply_patch_with_prefill(make_model("llama"), sparse())
    model.generate(random_ids(1, 300), max_new_tokens=1, prefill_chunk_size=128, do_sample=False)
    report = get_patch(model).report()
    assert report.sparse_calls == 2 * LAYERS  # of 128, 128 and 44 tokens
    assert report.dense_calls == {"decode": LAYERS}


@pytest.mark.parametrize(
    ("value", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError), ("128", TypeError)]
)
def test_the_limit_is_a_count(value, error):
    with pytest.raises(error, match="decode_below"):
        build_method("pbs", decode_below=value)

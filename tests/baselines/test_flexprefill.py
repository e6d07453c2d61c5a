import pytest
import torch

from baselines.flexprefill import FlexPrefill, top_entries
from pbs import BlockGrid, build_method
from pbs.ops.last_query_scores import last_query_scores, reference
from pbs.testing import make_qkv


def test_attention_of_the_last_queries_by_key_and_by_distance():
    q, k, _ = make_qkv(1, 4, 2, 60, 8, num_queries=50)
    vertical, slash = last_query_scores(q, k, scale=0.3, last_q=16)
    future = torch.arange(60) > torch.arange(44, 60)[:, None]
    logits = q[:, :, -16:] @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    weights = logits.masked_fill(future, float("-inf")).softmax(-1)
    torch.testing.assert_close(vertical, weights.sum(2))
    expected = torch.zeros_like(slash)
    for row in range(16):
        for key in range(44 + row + 1):
            expected[..., 44 + row - key] += weights[..., row, key]
    torch.testing.assert_close(slash, expected)


@pytest.mark.parametrize("chunk", [1, 500, 2000])
def test_chunks_of_queries_and_heads_change_nothing(chunk, monkeypatch):
    q, k, _ = make_qkv(2, 4, 2, 300, 16, num_queries=280, structure="mixed")
    method = FlexPrefill(block_size=32, gamma=0.7, tau=1.0)
    vertical, slash = last_query_scores(q, k, scale=0.25, last_q=32)
    mask = method.plan(q, k).block_mask()
    monkeypatch.setattr(reference, "MAX_ELEMENTS", chunk)
    again = last_query_scores(q, k, scale=0.25, last_q=32)
    torch.testing.assert_close(again[0], vertical, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(again[1], slash, rtol=1e-5, atol=1e-7)
    assert torch.equal(method.plan(q, k).block_mask(), mask)


def test_fewer_queries_than_a_block():
    q, k, _ = make_qkv(1, 2, 1, 60, 8, num_queries=3)
    vertical, slash = last_query_scores(q, k, scale=0.3, last_q=16)
    torch.testing.assert_close(vertical.sum(-1), torch.full((1, 2), 3.0))
    torch.testing.assert_close(slash.sum(-1), torch.full((1, 2), 3.0))


def test_top_entries_gives_each_head_its_own_count():
    mass = torch.tensor([[0.1, 0.4, 0.4, 0.1], [0.5, 0.2, 0.2, 0.1]])
    assert top_entries(mass, torch.tensor([1, 3])).tolist() == [
        [False, True, False, False],
        [True, True, True, False],
    ]


def test_underflowing_probability_is_not_nan_by_default():
    q, k, _ = make_qkv(1, 2, 2, 1024, 32)
    # One overwhelming key: the probability of every other block underflows to 0.
    k[:, :, 70] = q[:, :, -64:].mean(2) * 1e4
    q[:, :, -64:] = q[:, :, -64:].mean(2, keepdim=True)
    grid = BlockGrid(1024, 1024, 64, 64)
    vertical, _ = last_query_scores(q, k, scale=1.0, last_q=64)
    vertical = vertical / 64
    ours = FlexPrefill(block_size=64, tau=0.9)
    original = FlexPrefill(block_size=64, tau=0.9, nan_as_vs=True)
    assert ours._is_query_aware(q, k, vertical, grid, 1.0).all()
    assert not original._is_query_aware(q, k, vertical, grid, 1.0).any()


def test_minimum_budget_is_a_floor_in_tokens():
    q, k, _ = make_qkv(1, 4, 2, 4096, 32, structure="vertical")
    sparse = build_method("flexprefill", gamma=0.2).plan(q, k).density()
    floored = build_method("flexprefill", gamma=0.2, min_budget=1024).plan(q, k).density()
    assert (floored > sparse).all()
    short = build_method("flexprefill", min_budget=4096).plan(q, k)
    assert short.is_dense
    assert short.reason == "no more than 4096 keys"


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"gamma": 0.0}, ValueError, "gamma must lie"),
        ({"gamma": float("nan")}, ValueError, "gamma must lie"),
        ({"tau": -1}, ValueError, "tau must be at least 0"),
        ({"tau": "x"}, TypeError, "tau must be a number"),
        ({"min_budget": 0}, ValueError, "min_budget must be at least 1"),
        ({"max_budget": 1.5}, TypeError, "max_budget must be an integer"),
        ({"min_budget": 10, "max_budget": 5}, ValueError, "must not be below min_budget"),
        ({"budget_divisor": -128}, ValueError, "budget_divisor must be at least 1"),
        ({"threshold": 0.5}, ValueError, "unknown parameter of method 'flexprefill'"),
    ],
)
def test_wrong_settings_are_refused(params, error, message):
    with pytest.raises(error, match=message):
        build_method("flexprefill", **params)

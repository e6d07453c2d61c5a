import pytest
import torch

from pbs import block_sparse_attention, build_method
from pbs.testing import assert_within_budget, make_qkv
from tests.ops.attention_truth import causal_mask, eager_attention, exact_attention

SIZES = [(0, 1), (0, 17), (1, 1), (5, 40), (64, 64), (33, 129), (100, 16), (150, 100)]
SHAPES = [(300, 300), (100, 300), (1, 300), (65, 290), (1000, 1000)]


def a_shape_mask(num_queries, num_keys, n_init, n_local):
    keys = torch.arange(num_keys)
    distance = keys[num_keys - num_queries :, None] - keys
    return (distance >= 0) & ((keys < n_init) | (distance < n_local))


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize(("n_init", "n_local"), SIZES)
@pytest.mark.parametrize(("num_queries", "num_keys"), SHAPES)
def test_tokens_are_the_first_and_the_last(num_queries, num_keys, n_init, n_local, block_size):
    q, k, _ = make_qkv(2, 4, 2, num_keys, 16, num_queries=num_queries)
    method = build_method("streaming", n_init=n_init, n_local=n_local, block_size=block_size)
    plan = method.plan(q, k)
    assert not plan.is_dense
    expected = a_shape_mask(num_queries, num_keys, n_init, n_local)
    assert torch.equal(plan.token_mask(), expected.expand(2, 4, -1, -1))
    # Only tiles with a visible pair are computed, and whole ones without a mask.
    shape = (plan.grid.num_query_tiles, plan.grid.num_key_tiles)
    padded = torch.zeros(shape[0] * block_size, shape[1] * block_size)
    padded[:num_queries, :num_keys] = expected.float()
    seen = padded.unflatten(0, (shape[0], block_size)).unflatten(2, (shape[1], block_size))
    seen = seen.sum((1, 3))
    assert torch.equal(plan.block_mask()[0, 0], seen > 0)
    rows = torch.full((shape[0],), block_size)
    rows[-1] = num_queries - (shape[0] - 1) * block_size
    whole = (seen == rows[:, None] * block_size) & plan.grid.past_tiles()
    assert torch.equal(plan.num_blocks[0, 0].long(), whole.sum(-1))


@pytest.mark.parametrize("num_last_full", [1, 16, 17, 100])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(300, 300), (110, 300), (120, 290)])
def test_last_queries_see_everything_by_whole_tiles(num_queries, num_keys, num_last_full):
    q, k, _ = make_qkv(1, 2, 1, num_keys, 16, num_queries=num_queries)
    params = {"n_init": 3, "n_local": 32, "block_size": 16, "num_last_full": num_last_full}
    plan = build_method("streaming", **params).plan(q, k)
    expected = a_shape_mask(num_queries, num_keys, 3, 32)
    first_full = (num_queries - num_last_full) // 16 * 16
    expected[first_full:] = causal_mask(num_queries, num_keys)[first_full:]
    assert torch.equal(plan.token_mask()[0, 0], expected)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("num_last_full", [0, 20])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(150, 150), (70, 140)])
def test_kernels_compute_exactly_the_pairs(backend, num_last_full, num_queries, num_keys):
    q, k, v = make_qkv(2, 2, 1, num_keys, 32, num_queries=num_queries, structure="mixed")
    params = {"n_init": 20, "n_local": 64, "block_size": 32, "num_last_full": num_last_full}
    plan = build_method("streaming", **params).plan(q, k)
    mask = plan.token_mask()
    out = block_sparse_attention(q, k, v, plan, backend=backend)
    eager = eager_attention(q, k, v, mask, 32**-0.5)
    assert_within_budget(out, eager, exact_attention(q, k, v, mask, 32**-0.5))


def test_result_does_not_depend_on_the_tile():
    q, k, v = make_qkv(1, 4, 2, 500, 32, structure="mixed")
    outs = [
        build_method("streaming", n_init=20, n_local=100, block_size=block_size)(q, k, v)
        for block_size in (16, 32, 128)
    ]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outs[0], outs[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"n_init": 100, "n_local": 200}, "no more keys than n_init + n_local=300"),
        ({"n_init": 100, "n_local": 199}, ""),
        (
            {"n_init": 1, "n_local": 32, "block_size": 16, "num_last_full": 80},
            "no more queries than num_last_full=80",
        ),
        ({"n_init": 1, "n_local": 32, "block_size": 16, "num_last_full": 79}, ""),
    ],
)
def test_inputs_of_which_everything_is_seen_run_dense(params, reason):
    q, k, _ = make_qkv(1, 2, 1, 300, 16, num_queries=80)
    method = build_method("streaming", **params)
    assert method.plan(q, k).reason == reason
    assert method.densest().plan(q, k).is_dense


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"n_init": -1}, ValueError, "n_init must be at least 0, got -1"),
        ({"n_local": 0}, ValueError, "n_local must be at least 1, got 0"),
        ({"n_local": 1.5}, TypeError, "n_local must be an integer, got 1.5"),
        ({"num_last_full": True}, TypeError, "num_last_full must be an integer"),
        ({"block_size": 100}, ValueError, "power of two"),
        (
            {"num_last_full": 1, "n_local": 255},
            ValueError,
            r"at least 2 \* block_size .* got n_local=255 and block_size=128; use a smaller",
        ),
    ],
)
def test_wrong_parameters_are_refused(params, error, message):
    with pytest.raises(error, match=message):
        build_method("streaming", **params)

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pbs.ops.permutation import api as permutation
from pbs.ops.permutation import key_importance, reference, sort_segments, triton
from pbs.orders import ORDERS, build_order
from pbs.orders.base import moved_heads
from pbs.orders.greedy import query_centroids
from pbs.orders.last_block import LastBlockOrder
from pbs.orders.none import NaturalOrder
from pbs.orders.random_query import RandomQueryOrder
from pbs.testing import make_qkv

ARGUMENTS = {"scale": 0.2, "block_size": 16, "segment_size": 32}
POSITIONS = torch.arange(96.0).view(1, 1, 96, 1)
MOVING = [name for name in ORDERS.names if name != "none"]


def compute(name, q, k, *, shared=False, **params):
    return build_order(name, params).compute(q, k, shared=shared, **ARGUMENTS)


@pytest.mark.parametrize("num_queries", [110, 40, 1])
@pytest.mark.parametrize("shared", [False, True], ids=["per_query_head", "shared"])
@pytest.mark.parametrize("name", MOVING)
def test_order_permutes_whole_segments_and_is_the_same_alone_and_again(name, shared, num_queries):
    q, k, _ = make_qkv(2, 4, 2, 110, 16, num_queries=num_queries, structure="mixed")
    order = compute(name, q, k, shared=shared)
    assert order.shape == (2, 2 if shared else 4, 110)
    assert order.dtype == torch.int64
    segments = order[..., :96].unflatten(-1, (3, 32))
    assert torch.equal(segments.sort(-1).values, torch.arange(96).view(3, 32).expand_as(segments))
    assert torch.equal(order[..., 96:], torch.arange(96, 110).expand(*order.shape[:2], -1))
    assert moved_heads(order).all()
    assert torch.equal(compute(name, q, k, shared=shared), order)
    assert torch.equal(compute(name, q[1:], k[1:], shared=shared), order[1:])


@pytest.mark.parametrize("shared", [False, True], ids=["per_query_head", "shared"])
@pytest.mark.parametrize("name", MOVING)
def test_no_order_waits_for_the_device(name, shared):
    q, k, _ = make_qkv(2, 4, 2, 110, 16)
    # Fake tensors have no values: whatever asks for one raises.
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        order = compute(name, mode.from_tensor(q), mode.from_tensor(k), shared=shared)
    assert order.shape == (2, 2 if shared else 4, 110)


@pytest.mark.parametrize("shared", [False, True], ids=["per_query_head", "shared"])
@pytest.mark.parametrize("name", MOVING)
def test_orders_feed_the_triton_kernels(monkeypatch, name, shared):
    q, k, _ = make_qkv(1, 4, 2, 110, 16, dtype=torch.float16)
    expected = compute(name, q, k, shared=shared)
    monkeypatch.setattr(permutation, "backend_module", lambda *_: triton)
    order = compute(name, q, k, shared=shared)
    # Scores that differ in the last bits may swap neighbours.
    assert (order != expected).float().mean() < 0.1
    assert torch.equal(order.sort(-1).values, expected.sort(-1).values)


@pytest.mark.parametrize("name", ORDERS.names)
def test_without_a_complete_segment_no_key_moves(name):
    q, k, _ = make_qkv(1, 2, 1, 31, 16)
    assert compute(name, q, k) is None


@pytest.mark.parametrize("name", [name for name in MOVING if name != "random"])
def test_ties_keep_the_natural_order(name):
    q, k, _ = make_qkv(1, 2, 1, 96, 16)
    # Whole numbers: sums are exact, so that equal keys have equal scores.
    q, k[:] = q.round(), 1.0
    assert torch.equal(compute(name, q, k)[0, 0], torch.arange(96))


def test_last_block_order_sorts_segments_by_attention_of_the_last_queries():
    q, k, _ = make_qkv(2, 4, 2, 110, 16, structure="vertical")
    order = LastBlockOrder().compute(q, k, shared=False, **ARGUMENTS)
    keys = k.repeat_interleave(2, 1)[:, :, :96]
    scores = (q[:, :, -16:].double() @ keys.double().transpose(-1, -2) * 0.2).softmax(-1).mean(2)
    for start in range(0, 96, 32):
        places = order[..., start : start + 32]
        assert (scores.gather(-1, places).diff(dim=-1) <= 1e-9).all()
        assert torch.equal(places // 32, torch.full_like(places, start // 32))
    assert torch.equal(order[..., 96:], torch.arange(96, 110).expand(2, 4, -1))


def test_shared_order_averages_the_queries_of_a_group():
    q, k, _ = make_qkv(2, 4, 2, 96, 16)
    shared = LastBlockOrder().compute(q, k, shared=True, **ARGUMENTS)
    mean = q.unflatten(1, (2, 2)).mean(2)
    assert shared.shape == (2, 2, 96)
    assert torch.equal(shared, LastBlockOrder().compute(mean, k, shared=False, **ARGUMENTS))


def test_average_query_votes_alone():
    q, k, _ = make_qkv(1, 4, 2, 96, 16)
    mean = q.double().mean(2, keepdim=True)
    scores = (mean @ k.double().repeat_interleave(2, 1).transpose(-1, -2) * 0.2).softmax(-1)[
        :, :, 0
    ]
    expected = sort_segments(scores, num_keys=96, segment_size=32)
    assert torch.equal(compute("avg_query", q, k), expected)


def test_random_queries_vote_and_the_seed_draws_them():
    q, k, _ = make_qkv(1, 4, 2, 96, 16)
    # More than there are: all of them, whatever the seed.
    all_vote = sort_segments(key_importance(q, k, scale=0.2), num_keys=96, segment_size=32)
    for seed in (0, 1):
        assert torch.equal(compute("random_query", q, k, num_queries=500, seed=seed), all_vote)
    rows = RandomQueryOrder(num_queries=5, seed=3).proxy_queries(POSITIONS, block_size=16)
    rows = rows.flatten().long()
    assert len(rows.unique()) == 5
    assert torch.equal(rows, rows.sort().values)
    scores = key_importance(q[:, :, rows], k, scale=0.2)
    expected = sort_segments(scores, num_keys=96, segment_size=32)
    assert torch.equal(compute("random_query", q, k, num_queries=5, seed=3), expected)
    assert not torch.equal(compute("random_query", q, k, seed=4), compute("random_query", q, k))


def test_random_queries_are_drawn_from_the_whole_sequence():
    draws = [
        RandomQueryOrder(num_queries=8, seed=seed).proxy_queries(POSITIONS, block_size=16)
        for seed in range(100)
    ]
    # 800 draws from 96: each about 8 times.
    counts = torch.cat(draws).long().flatten().bincount(minlength=96)
    assert counts.min() >= 1
    assert counts.max() <= 20
    assert draws[0].shape == (1, 1, 8, 1)
    default = RandomQueryOrder().proxy_queries(POSITIONS, block_size=16)
    assert default.shape == (1, 1, 16, 1)


def test_random_order_differs_by_head_segment_and_seed_but_not_by_length():
    q, k, _ = make_qkv(1, 4, 2, 3200, 16)
    order = compute("random", q, k)
    local = (order.unflatten(-1, (-1, 32)) % 32).flatten(0, 2)
    assert len(local.unique(dim=0)) == len(local)
    # Every key comes to every place equally often: 400 shuffles, standard error 0.46.
    assert ((local.double().mean(0) - 15.5).abs() < 2.5).all()
    assert torch.equal(compute("random", q[:, :, :640], k[:, :, :640]), order[..., :640])
    assert not torch.equal(compute("random", q, k, seed=1), order)


@pytest.mark.parametrize("num_queries", [110, 75, 16])
def test_greedy_blocks_take_the_most_similar_free_keys_in_turn(num_queries):
    q, k, _ = make_qkv(1, 4, 2, 110, 16, num_queries=num_queries)
    order = compute("greedy", q, k)
    first = 110 - num_queries
    for head in range(4):
        for start in range(0, 96, 32):
            free = list(range(start, start + 32))
            for block in (start, start + 16):
                # Before the first query: the first block that has queries.
                block_of_queries = max(block, first // 16 * 16)
                rows = slice(max(block_of_queries - first, 0), block_of_queries + 16 - first)
                centroid = q[0, head, rows].double().mean(0)
                similarity = (k[0, head // 2, free].double() @ centroid).tolist()
                ranked = sorted(zip(similarity, free, strict=True), key=lambda x: (-x[0], x[1]))
                expected = [key for _, key in ranked[:16]]
                assert order[0, head, block : block + 16].tolist() == expected
                free = [key for key in free if key not in expected]


def test_query_centroids_are_means_over_real_queries():
    q = torch.arange(7.0).view(1, 1, 7, 1)  # at positions 3 to 9
    centroids = query_centroids(q, num_keys=10, block_size=2).flatten().tolist()
    assert centroids == [0.0, 0.0, 1.5, 3.5, 5.5]


def test_greedy_survives_keys_without_a_finite_similarity():
    q, k, _ = make_qkv(1, 2, 1, 64, 16)
    k[:, :, 5] = -1e38
    order = compute("greedy", q * 1e3, k)
    assert torch.equal(order.sort(-1).values, torch.arange(64).expand(1, 2, -1))


def test_sorting_ties_keep_the_natural_order():
    order = sort_segments(torch.zeros(1, 1, 64), num_keys=70, segment_size=32)
    assert torch.equal(order[0, 0], torch.arange(70))
    assert not moved_heads(order).any()


def test_natural_order_moves_nothing():
    q, k, _ = make_qkv(1, 2, 1, 100, 16)
    assert NaturalOrder().compute(q, k, shared=False, **ARGUMENTS) is None


def test_importance_sums_to_one_per_head():
    q, k, _ = make_qkv(2, 6, 2, 50, 16)
    total = key_importance(q, k, scale=0.25).sum(-1)
    torch.testing.assert_close(total, torch.ones(2, 6))


@pytest.mark.parametrize("max_scores", [1, 2 * 3 * 50, 2 * 3 * 50 * 7])
def test_importance_is_the_same_in_bounded_memory(monkeypatch, max_scores):
    q, k, _ = make_qkv(2, 6, 2, 50, 16)
    logits = q.double() @ k.double().repeat_interleave(3, 1).transpose(-1, -2) * 0.25
    expected = logits.softmax(-1)
    monkeypatch.setattr(reference, "MAX_SCORES", max_scores)
    scores = key_importance(q, k, scale=0.25)
    torch.testing.assert_close(scores, expected.mean(2).float())


@pytest.mark.parametrize(
    ("name", "params", "error", "message"),
    [
        ("random", {"seed": -1}, ValueError, "seed must not be negative, got -1"),
        ("random", {"seed": 0.5}, TypeError, "seed must be an integer, got 0.5"),
        ("random_query", {"seed": True}, TypeError, "seed must be an integer"),
        ("random_query", {"num_queries": 0}, ValueError, "num_queries must be at least 1, got 0"),
        ("random_query", {"num_queries": "8"}, TypeError, "num_queries must be an integer"),
        ("adaptive", {"num_rows": 0}, ValueError, "num_rows must be at least 1"),
        ("adaptive", {"base": "none"}, ValueError, "an order that moves keys, got 'none'"),
        ("adaptive", {"base": "adaptive"}, ValueError, "an order that moves keys"),
        ("adaptive", {"base": "last"}, ValueError, "Did you mean 'last_block'"),
        ("adaptive", {"base_params": {"seed": 1}}, ValueError, "parameter of order 'last_block'"),
        ("last_block", {"num_queries": 3}, ValueError, "parameter of order 'last_block'"),
        ("greedy", {"seed": 3}, ValueError, "parameter of order 'greedy'"),
    ],
)
def test_wrong_parameters_are_refused(name, params, error, message):
    with pytest.raises(error, match=message):
        build_order(name, params)

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pbs import build_method
from pbs.ops.grid import BlockGrid
from pbs.ops.pooling import mean_pool
from pbs.orders import queries
from pbs.orders.queries import gather_queries, order_queries
from pbs.testing import make_qkv
from tests.ops.attention_truth import causal_mask

B, S = 16, 32


def compute(q, k):
    grid = BlockGrid(q.shape[2], k.shape[2], B, B)
    candidates = grid.past_tiles(segment_size=S, query_segment=S)
    return order_queries(q, k, candidates=candidates, block_size=B, segment_size=S)


def expected_order(q, k):
    """Row by row: the most similar mean key among the blocks of segments before the chunk's."""
    num_queries, offset = q.shape[2], k.shape[2] - q.shape[2]
    means = mean_pool(k, B).double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    order = torch.empty(q.shape[:3], dtype=torch.long)
    for sequence in range(q.shape[0]):
        for head in range(q.shape[1]):
            for start in range(0, num_queries, S):
                rows = range(start, min(start + S, num_queries))
                blocks = means[sequence, head, : (start + offset) // S * S // B]
                nearest = dict.fromkeys(rows, 0)
                if len(blocks):
                    scores = q[sequence, head, rows.start : rows.stop].double() @ blocks.T
                    nearest = dict(zip(rows, scores.argmax(-1).tolist(), strict=True))
                ranked = sorted(rows, key=lambda row: (nearest[row], row))
                order[sequence, head, start : start + len(rows)] = torch.tensor(ranked)
    return order


@pytest.mark.parametrize("num_queries", [150, 128, 100, 41, 1])
def test_queries_are_sorted_by_their_most_similar_block_inside_chunks(num_queries):
    q, k, _ = make_qkv(2, 4, 2, 150, 16, num_queries=num_queries, structure="mixed")
    assert torch.equal(compute(q, k), expected_order(q, k))


def test_ties_and_chunks_without_selectable_blocks_keep_the_natural_order():
    q, k, _ = make_qkv(1, 2, 1, 100, 16)
    assert torch.equal(compute(q, k)[..., :S], torch.arange(S).expand(1, 2, -1))
    # Whole numbers: sums are exact, so that equal keys have equal similarities.
    q, k[:] = q.round(), 1.0
    assert torch.equal(compute(q, k), torch.arange(100).expand(1, 2, -1))


def test_keys_of_each_query_head_may_have_an_order_of_their_own():
    q, k, _ = make_qkv(1, 4, 2, 150, 16)
    repeated = k.repeat_interleave(2, 1)
    assert torch.equal(compute(q, repeated), compute(q, k))


@pytest.mark.parametrize("max_scores", [1, 5000])
def test_bounded_memory_changes_nothing(monkeypatch, max_scores):
    q, k, _ = make_qkv(1, 4, 2, 150, 16, structure="mixed")
    expected = compute(q, k)
    monkeypatch.setattr(queries, "MAX_SCORES", max_scores)
    assert torch.equal(compute(q, k), expected)


def test_sorting_queries_does_not_wait_for_the_device():
    q, k, _ = make_qkv(2, 4, 2, 150, 16)
    with FakeTensorMode() as mode:
        assert compute(mode.from_tensor(q), mode.from_tensor(k)).shape == (2, 4, 150)


def method_of(target, **changes):
    params = {"block_size": B, "segment_size": S, "threshold": 0.6, "decode_below": 0}
    return build_method("pbs", target=target, **{**params, **changes})


def test_targets_move_what_they_say():
    q, k, _ = make_qkv(1, 4, 2, 150, 16, structure="mixed")
    natural = torch.arange(150).expand(1, 4, -1)
    plans = {target: method_of(target).plan(q, k) for target in ("keys", "queries")}
    assert plans["keys"].query_order is None
    assert plans["queries"].order is None
    assert torch.equal(plans["queries"].query_order, compute(q, k))
    assert not torch.equal(plans["keys"].key_order(), natural)

    both = method_of("keys_then_queries").plan(q, k)
    assert torch.equal(both.key_order(), plans["keys"].key_order())
    assert torch.equal(both.query_order, compute(q, both.ordered_keys))

    both = method_of("queries_then_keys").plan(q, k)
    assert torch.equal(both.query_order, plans["queries"].query_order)
    moved = method_of("keys").plan(gather_queries(q, both.query_order), k)
    assert torch.equal(both.key_order(), moved.key_order())


@pytest.mark.parametrize("order", ["none", "last_block", "greedy", "adaptive"])
@pytest.mark.parametrize("target", ["queries", "keys_then_queries", "queries_then_keys"])
@pytest.mark.parametrize("num_queries", [150, 128, 77, 10])
def test_everything_selected_equals_dense_for_all_orders(target, order, num_queries):
    q, k, v = make_qkv(2, 4, 2, 150, 16, num_queries=num_queries, structure="mixed")
    method = method_of(target, order=order, threshold=1.0, gqa="shared")
    tokens = method.plan(q, k).token_mask()
    assert torch.equal(tokens, causal_mask(num_queries, 150).expand(2, 4, -1, -1))
    dense = build_method("flash")(q, k, v)
    torch.testing.assert_close(method(q, k, v), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["queries", "keys_then_queries", "queries_then_keys"])
def test_selector_scores_the_moved_queries(target):
    q, k, _ = make_qkv(1, 4, 2, 150, 16, structure="mixed")
    method = method_of(target)
    seen = []
    score = method._selector.select
    method._selector.select = lambda q, k, **kwargs: (
        seen.append(q),
        score(q, k, **kwargs),
    )[1]
    plan = method.plan(q, k)
    assert torch.equal(seen[0], gather_queries(q, plan.query_order))


def test_queries_that_look_alike_share_tiles_and_need_fewer_blocks():
    # Even and odd queries look at different halves of the past.
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(2, 32, generator=generator), dim=-1)
    k = directions[(torch.arange(1024) // 128) % 2][None, None] * 6
    q = directions[torch.arange(1024) % 2][None, None] * 6
    params = {"block_size": 32, "segment_size": 64, "order": "none", "threshold": 0.9}
    params["force_select_first_block"] = False
    natural = build_method("pbs", **params).plan(q, k)
    moved = build_method("pbs", target="queries", **params).plan(q, k)
    assert moved.density().item() < 0.7 * natural.density().item()


def test_unknown_target_is_refused():
    with pytest.raises(ValueError, match=r"unknown target 'query'\. Did you mean 'queries'"):
        method_of("query")

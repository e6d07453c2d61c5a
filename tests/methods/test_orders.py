import torch

from pbs.orders.base import importance, sort_segments
from pbs.orders.last_block import LastBlockOrder
from pbs.orders.none import NaturalOrder
from pbs.testing import make_qkv

ARGUMENTS = {"scale": 0.2, "block_size": 16, "segment_size": 32}


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


def test_ties_keep_the_natural_order():
    order = sort_segments(torch.zeros(1, 1, 64), num_keys=70, segment_size=32)
    assert torch.equal(order[0, 0], torch.arange(70))


def test_no_complete_segment_and_no_order_move_nothing():
    q, k, _ = make_qkv(1, 2, 1, 31, 16)
    assert LastBlockOrder().compute(q, k, shared=False, **ARGUMENTS) is None
    assert NaturalOrder().compute(q, k, shared=False, **ARGUMENTS) is None


def test_importance_sums_to_one_per_head():
    q, k, _ = make_qkv(2, 6, 2, 50, 16)
    total = importance(q, k, scale=0.25).sum(-1)
    torch.testing.assert_close(total, torch.ones(2, 6))

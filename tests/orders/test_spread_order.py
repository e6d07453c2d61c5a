"""Orders by spread queries: what one early query wants is not lost."""

import pytest
import torch

from pbs.orders.spread import SpreadOrder
from pbs.testing import make_qkv

SETTINGS = {"scale": 32**-0.5, "block_size": 32, "segment_size": 64}


def test_keys_stand_by_the_power_mean_of_causal_attention():
    q, k, _ = make_qkv(1, 2, 1, 256, 32, structure="mixed")
    order = SpreadOrder(stride=1, power=2.0).compute(q, k, shared=False, **SETTINGS)
    logits = (q[0].double() @ k[0].double().transpose(-1, -2)) * SETTINGS["scale"]
    rows, keys = torch.arange(256)[:, None], torch.arange(256)
    past = keys < rows // 64 * 64
    weights = logits.masked_fill(~past, float("-inf")).softmax(-1).nan_to_num()
    score = weights.pow(2).sum(1) / past.sum(0).clamp(min=1)
    expected = score.unflatten(-1, (4, 64)).argsort(dim=-1, descending=True, stable=True)
    expected = (expected + torch.arange(4)[:, None] * 64).flatten(1)
    assert torch.equal(order[0], expected)


def test_a_shared_order_is_one_for_each_key_value_head_and_tails_stay():
    q, k, _ = make_qkv(1, 4, 2, 300, 32, structure="mixed")
    order = SpreadOrder(num_rows=16, stride=1).compute(q, k, shared=True, **SETTINGS)
    assert order.shape == (1, 2, 300)
    assert torch.equal(order[..., 256:], torch.arange(256, 300).expand(1, 2, -1))
    assert torch.equal(order.sort(-1).values, torch.arange(300).expand(1, 2, -1))
    assert SpreadOrder().compute(q[:, :, :9], k[:, :, :9], shared=True, **SETTINGS) is None
    few = SpreadOrder().compute(q[:, :, -5:], k, shared=False, **SETTINGS)  # a filled cache
    assert torch.equal(few.sort(-1).values, torch.arange(300).expand(1, 4, -1))


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="num_rows"):
        SpreadOrder(num_rows=0)
    with pytest.raises(ValueError, match="stride"):
        SpreadOrder(stride=0)
    with pytest.raises(ValueError, match="power"):
        SpreadOrder(power=0.5)


@pytest.mark.parametrize(("num_queries", "asked"), [(1, 1), (9, 2), (8192, 1024), (65536, 2048)])
def test_short_prompts_ask_fewer_queries(num_queries, asked):
    assert SpreadOrder().num_asked(num_queries) == asked

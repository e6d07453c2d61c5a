"""Properties of every method over random parameters, shapes and padding.

The draws are the same in every run. The default run has NUM_CASES calls per method, the slow one
(``pytest -m slow tests/properties``) NUM_SLOW_CASES and longer ones.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings

from pbs.methods import METHODS
from tests.ops.attention_truth import causal_mask, exact_attention
from tests.properties.draws import PARAMETERS, Case, cases, scale_of
from tests.properties.promises import largest_density, promised_pairs

NUM_CASES = 120
NUM_SLOW_CASES = 500
# Largest error in multiples of the dtype's eps and the largest value: a wrong pair is far outside.
ERROR_IN_EPS = 32
REPEATABLE = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
}


def test_every_method_is_drawn():
    assert sorted(PARAMETERS) == METHODS.names


@pytest.mark.parametrize("name", METHODS.names)
def test_plans_keep_their_promises_and_outputs_are_theirs(name, tmp_path):
    @settings(max_examples=NUM_CASES, **REPEATABLE)
    @given(cases(name, max_keys=400))
    def check(case):
        check_call(case, tmp_path)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS.names)
def test_plans_keep_their_promises_in_many_more_and_longer_calls(name, tmp_path):
    @settings(max_examples=NUM_SLOW_CASES, **REPEATABLE)
    @given(cases(name, max_keys=700))
    def check(case):
        check_call(case, tmp_path)

    check()


def check_call(case: Case, folder):
    """One call: every plan it made, and what came out."""
    note(str(case))
    method = case.build(folder)
    q, k, v = case.tensors()
    geometry = case.geometry
    spans = list(geometry.spans())
    real_queries = torch.zeros(case.batch, geometry.num_queries, dtype=torch.bool)
    real_keys = torch.zeros(case.batch, geometry.num_keys, dtype=torch.bool)
    for members, rows, slots in spans:
        real_queries[members, rows] = True
        real_keys[members, slots] = True
    # What is padding, or not yet written, must not matter.
    for tensor, real in ((q, real_queries), (k, real_keys), (v, real_keys)):
        tensor.masked_fill_(~real[:, None, :, None], float("nan"))
    calls = []
    method.recorder = calls.append
    out = method(q, k, v, layer_idx=0, geometry=geometry)
    assert not out.masked_fill(real_queries[:, None, :, None], 0).any()
    assert len(calls) == len(spans)
    for call, (members, rows, slots) in zip(calls, spans, strict=True):
        mask = call.plan.token_mask()
        check_pairs(case, call.plan, mask)
        check_density(case, call.plan, mask)
        check_orders(case, call.plan)
        part = (q[members, :, rows], k[members, :, slots], v[members, :, slots])
        expected = exact_attention(*part, mask, scale_of(case))
        bound = ERROR_IN_EPS * torch.finfo(case.dtype).eps * part[2].abs().max().double()
        assert (out[members, :, rows] - expected).abs().max() <= bound


def check_pairs(case, plan, mask):
    """Causal, and complete where the method promises it: every promise includes the diagonal."""
    assert not (mask & ~causal_mask(*mask.shape[2:])).any()
    promised, is_all = promised_pairs(case, plan)
    assert not (promised & ~mask).any()
    if is_all:
        assert torch.equal(mask, promised.expand_as(mask))


def check_density(case, plan, mask):
    """In range, and as many tiles as are marked."""
    grid = plan.grid
    num_tiles, density = plan.num_tiles(), plan.density()
    assert density.shape == (plan.batch_size, case.q_heads)
    assert (num_tiles >= grid.num_query_tiles).all()
    assert (density <= largest_density(case, plan)).all()
    assert (mask.sum((-1, -2)) <= num_tiles * grid.query_tile * grid.key_tile).all()
    if plan.is_dense:
        assert (density == 1).all()
    if plan.columns is None:
        assert torch.equal(plan.block_mask().sum((-1, -2)), num_tiles)


def check_orders(case, plan):
    """Permutations with an inverse, inside segments of keys and chunks of queries."""
    grid = plan.grid
    segment = case.params.get("segment_size", 1)
    orders = [(plan.key_order(), grid.num_keys)]
    if plan.query_order is not None:
        orders.append((plan.query_order, grid.num_queries))
    for order, count in orders:
        places = torch.arange(count).expand(plan.batch_size, case.q_heads, -1)
        assert order.shape == places.shape
        assert torch.equal(order.gather(-1, order.argsort(-1)), places)
        assert torch.equal(order // segment, places // segment)
    tail = torch.arange(grid.num_keys // segment * segment, grid.num_keys)
    last = orders[0][0][..., grid.num_keys - len(tail) :]
    assert torch.equal(last, tail.expand_as(last))  # an incomplete segment stays

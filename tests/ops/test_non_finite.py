"""A key or value that is not finite changes no query that does not see it, and no other value."""

import pytest
import torch

from pbs import AttentionPlan, BlockGrid, Geometry, block_sparse_attention
from pbs.ops.block_sparse_attention.common import weighted_values
from pbs.testing import make_qkv
from tests.methods.cases import CASES, build
from tests.ops.test_block_sparse_attention import random_plan
from tests.ops.test_plan import segment_order

BACKENDS = ["reference", "cpu", "triton"]
NAN, INF = float("nan"), float("inf")
# In the middle and at the ends of a tile of 16, in the first and the last one, which is partial.
PLACES = (0, 5, 31, 32, 40, 49)


def spoiled(k, v, where, place, value):
    """Copies with one key, one number of a value, or both, that are not finite."""
    k, v = k.clone(), v.clone()
    if "k" in where:
        k[:, :, place] = value
    if "v" in where:
        v[:, :, place, 3] = value
    return k, v


def check_leaks_nothing(q, k, v, plan, backend, where, place, value):
    expected = block_sparse_attention(q, k, v, plan, backend=backend)
    k_bad, v_bad = spoiled(k, v, where, place, value)
    out = block_sparse_attention(q, k_bad, v_bad, plan, backend=backend)
    sees = plan.token_mask()[..., place].expand(q.shape[:3])
    torch.testing.assert_close(out[~sees], expected[~sees], rtol=1e-5, atol=1e-5)
    assert sees.any()
    if where == "v":  # the other numbers of the value are what they were
        torch.testing.assert_close(out[sees][:, 4:], expected[sees][:, 4:], rtol=1e-3, atol=1e-4)
        assert not out[sees][:, 3].isfinite().any()
    elif value != value:
        assert out[sees].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["k", "v", "kv"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("num_queries", [50, 21])
def test_rows_that_do_not_see_it_stay(num_queries, value, where, backend):
    q, k, v = make_qkv(1, 2, 1, 50, 16, num_queries=num_queries)
    plan = random_plan(1, 2, BlockGrid(num_queries, 50, 16, 16))
    for place in PLACES if backend != "triton" else PLACES[::3]:
        if plan.token_mask()[..., place].any():
            check_leaks_nothing(q, k, v, plan, backend, where, place, value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_in_16_bits(dtype, backend):
    if backend == "triton" and dtype == torch.bfloat16:
        dtype = torch.float32  # the interpreter gets bf16 wrong
    q, k, v = make_qkv(1, 2, 1, 100, 16, dtype=dtype)
    plan = random_plan(1, 2, BlockGrid(100, 100, 32, 32))
    expected = block_sparse_attention(q, k, v, plan, backend=backend)
    out = block_sparse_attention(q, *spoiled(k, v, "kv", 70, NAN), plan, backend=backend)
    torch.testing.assert_close(out[:, :, :70], expected[:, :, :70])
    assert out[:, :, 70:96].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_of_them_seen_by_different_rows(backend):
    q, k, v = make_qkv(1, 1, 1, 32, 16)
    grid = BlockGrid(32, 32, 32, 32)
    plan = AttentionPlan.dense(grid, 1, 1, device="cpu", reason="a test")
    v[:, :, 10, 2], v[:, :, 20, 2], v[:, :, 25] = INF, -INF, NAN
    out = block_sparse_attention(q, k, v, plan, backend=backend)[0, 0]
    assert out[:10].isfinite().all()
    assert not out[10:, 2].isfinite().any()
    assert out[10:25, 3:].isfinite().all()
    assert out[25:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_moved_keys_and_a_local_window(backend):
    q, k, v = make_qkv(1, 3, 1, 110, 16, structure="vertical")
    order = segment_order(110, 48)[:1, :1].contiguous()
    plan = random_plan(1, 3, BlockGrid(110, 110, 16, 16), segment_size=48, order=order)
    for where in ("k", "v"):
        check_leaks_nothing(q, k, v, plan, backend, where, 100, NAN)
    q, k, v = (x[:, :, :70] for x in (q, k, v))
    starts = torch.arange(5, dtype=torch.int32) * 16
    near = AttentionPlan(
        BlockGrid(70, 70, 16, 16),
        1,
        3,
        blocks=torch.zeros(1, 1, 5, 0, dtype=torch.int32),
        num_blocks=torch.zeros(1, 1, 5, dtype=torch.int32),
        windows=starts.expand(1, 1, 5, 5),
        num_windows=torch.arange(1, 6, dtype=torch.int32)[None, None],
        local_window=torch.tensor([[3, 20], [10, 1], [0, 5]], dtype=torch.int32),
    )
    for place in (0, 69):
        for where in ("k", "v"):
            check_leaks_nothing(q, k, v, near, backend, where, place, NAN)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_is_not_finite_changes_no_other(backend):
    q, k, v = make_qkv(1, 2, 1, 100, 16)
    plan = random_plan(1, 2, BlockGrid(100, 100, 16, 16))
    expected = block_sparse_attention(q, k, v, plan, backend=backend)
    q[:, :, 50] = NAN
    out = block_sparse_attention(q, k, v, plan, backend=backend)
    others = torch.arange(100) != 50
    torch.testing.assert_close(out[:, :, others], expected[:, :, others])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("where", ["k", "v", "kv"])
@pytest.mark.parametrize("case", [case for case in CASES if case != "flash"])
def test_no_method_lets_the_future_or_the_padding_make_a_row_nan(case, where, backend):
    q, k, v = make_qkv(2, 4, 2, 300, 32, structure="mixed")
    method = build(case, backend=backend)
    out = method(q, *spoiled(k, v, where, 290, NAN))
    assert out[:, :, :290].isfinite().all()
    geometry = Geometry(300, 300, 0, (0, 20), (270, 300))
    expected = method(q, k, v, geometry=geometry)
    padding = torch.zeros(2, 300, dtype=torch.bool)
    padding[0, 270:], padding[1, :20] = True, True
    k, v = (x.masked_fill(padding[:, None, :, None], NAN) for x in (k, v))
    torch.testing.assert_close(method(q, k, v, geometry=geometry), expected)


def test_values_count_for_those_that_see_them():
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]])
    seen = torch.tensor([[True, True, False], [True, True, True]])
    values = torch.tensor([[1.0, INF, 1.0], [3.0, 1.0, -INF], [NAN, 1.0, INF]])
    out = weighted_values(weights, values, seen)
    expected = torch.tensor([[2.0, INF, -INF], [NAN, INF, NAN]])
    torch.testing.assert_close(out, expected, equal_nan=True)
    finite = values.nan_to_num(0.0, 5.0, 5.0)
    assert torch.equal(weighted_values(weights, finite, seen), weights @ finite)

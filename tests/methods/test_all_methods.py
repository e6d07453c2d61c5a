"""What every method must satisfy, whatever it selects."""

import pytest
import torch

from pbs import Geometry, block_sparse_attention
from pbs.testing import assert_within_budget, make_qkv
from tests.methods.cases import CASES, build
from tests.ops.attention_truth import causal_mask, eager_attention, exact_attention

ALL = sorted(CASES)
LENGTHS = [1, 31, 32, 33, 63, 64, 65, 128, 129, 300]


def dense_check(out, q, k, v):
    mask = causal_mask(q.shape[2], k.shape[2])
    scale = q.shape[3] ** -0.5
    assert_within_budget(
        out, eager_attention(q, k, v, mask, scale), exact_attention(q, k, v, mask, scale)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_keys", LENGTHS)
@pytest.mark.parametrize("case", ALL)
def test_densest_setting_equals_dense_attention(case, num_keys, dtype):
    q, k, v = make_qkv(2, 4, 2, num_keys, 32, dtype=dtype, structure="mixed")
    method = build(case, densest=True)
    dense_check(method(q, k, v), q, k, v)
    plan = method.plan(q, k)
    assert torch.equal(plan.token_mask(), causal_mask(num_keys, num_keys).expand(2, 4, -1, -1))
    # Tiles of moved queries compute the future part of their chunk, too.
    density = plan.density()
    assert (density >= 1).all() if plan.query_order is not None else (density == 1).all()


@pytest.mark.parametrize("num_keys", [1, 65, 129, 300, 1000])
@pytest.mark.parametrize("num_queries", [None, 1, 40, 64])
@pytest.mark.parametrize("case", ALL)
def test_plan_is_causal_has_its_diagonal_and_moves_keys_only_in_segments(
    case, num_keys, num_queries
):
    if num_queries is not None and num_queries > num_keys:
        num_queries = num_keys
    q, k, _ = make_qkv(2, 4, 2, num_keys, 32, num_queries=num_queries, structure="mixed")
    method = build(case)
    plan = method.plan(q, k)
    tokens = plan.token_mask()
    causal = causal_mask(q.shape[2], num_keys)
    assert not (tokens & ~causal).any()
    positions = torch.arange(q.shape[2]) + num_keys - q.shape[2]
    assert tokens[..., torch.arange(q.shape[2]), positions].all()
    assert plan.block_mask().shape == (2, 4, plan.grid.num_query_tiles, plan.grid.num_key_tiles)
    density = plan.density()
    assert density.shape == (2, 4)
    # Columns take tiles of their own beside unaligned windows: at most one more per query tile.
    extra = 0 if plan.columns is None else plan.grid.num_query_tiles
    if plan.query_order is not None:
        # A tile of moved queries computes its chunk's segment whole.
        extra = plan.grid.num_query_tiles * (method.segment_size // plan.grid.key_tile - 1)
    assert ((density > 0) & (density <= 1 + extra / plan.grid.num_causal_tiles)).all()
    order = plan.key_order()
    assert order.shape == (2, 4, num_keys)
    assert torch.equal(order.sort(-1).values, torch.arange(num_keys).expand_as(order))
    segment = getattr(method, "segment_size", 1)
    assert torch.equal(order // segment, (torch.arange(num_keys) // segment).expand_as(order))
    tail = num_keys // segment * segment
    assert torch.equal(order[..., tail:], torch.arange(tail, num_keys).expand(2, 4, -1))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("groups", [1, 4, 7])
@pytest.mark.parametrize("case", ALL)
def test_output_is_softmax_over_the_plans_pairs(case, groups, head_dim):
    q, k, v = make_qkv(1, 2 * groups, 2, 257, head_dim, structure="mixed")
    method = build(case)
    mask = method.plan(q, k).token_mask()
    scale = head_dim**-0.5
    assert_within_budget(
        method(q, k, v),
        eager_attention(q, k, v, mask, scale),
        exact_attention(q, k, v, mask, scale),
    )


@pytest.mark.parametrize("case", ALL)
def test_triton_kernel_carries_the_plan_out(case):
    q, k, v = make_qkv(1, 4, 2, 200, 64, structure="mixed")
    plan = build(case).plan(q, k)
    expected = block_sparse_attention(q, k, v, plan, backend="reference")
    out = block_sparse_attention(q, k, v, plan, backend="triton")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ALL)
def test_future_tokens_change_no_earlier_output_when_everything_is_selected(case):
    q, k, v = make_qkv(1, 4, 2, 300, 32, structure="mixed")
    method = build(case, densest=True)
    before = method(q, k, v)[:, :, :200]
    q[:, :, 200:], k[:, :, 200:], v[:, :, 200:] = 3.0, -2.0, 100.0
    torch.testing.assert_close(method(q, k, v)[:, :, :200], before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ALL)
def test_future_values_never_leak_through_a_plan(case):
    q, k, v = make_qkv(1, 4, 2, 300, 32, structure="mixed")
    method = build(case)
    before = method(q, k, v)[:, :, :200]
    v[:, :, 200:] = 1e30  # masked weights must be exactly 0
    torch.testing.assert_close(method(q, k, v)[:, :, :200], before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", ALL)
def test_padded_batch_equals_its_rows_alone(case, side):
    lengths = [300, 190, 300]
    q, k, v = make_qkv(3, 4, 2, 300, 32, structure="mixed")
    mask = torch.zeros(3, 300, dtype=torch.bool)
    for row, length in zip(mask, lengths, strict=True):
        row[: length if side == "right" else None] = True
        if side == "left":
            row[: 300 - length] = False
    geometry = Geometry.from_padding_mask(mask, num_queries=300)
    q[~mask[:, None].expand(3, 4, 300)] = float("nan")
    method = build(case)
    out = method(q, k, v, geometry=geometry)
    for index, row in enumerate(mask):
        alone = method(*(x[index : index + 1, :, row] for x in (q, k, v)))
        torch.testing.assert_close(out[index : index + 1, :, row], alone, rtol=1e-5, atol=1e-5)
        assert not out[index][:, ~row].any()


@pytest.mark.parametrize("case", ALL)
def test_filled_cache_is_attended_to(case):
    q, k, v = make_qkv(1, 4, 2, 300, 32, structure="mixed")
    method = build(case, densest=True)
    torch.testing.assert_close(
        method(q[:, :, 260:], k, v), method(q, k, v)[:, :, 260:], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("case", ALL)
def test_constant_keys_and_one_overwhelming_key(case):
    q, k, v = make_qkv(1, 4, 2, 300, 32)
    method = build(case)
    k[:] = 1.0
    first, again = method.plan(q, k).block_mask(), method.plan(q, k).block_mask()
    assert torch.equal(first, again)
    assert method(q, k, v).isfinite().all()
    k[:, :, 70] = q.mean(2).repeat_interleave(1, 1)[:, ::2] * 1e4
    assert method(q, k, v).isfinite().all()


@pytest.mark.parametrize("case", ALL)
def test_scale_reaches_selection_and_attention(case):
    q, k, v = make_qkv(1, 4, 2, 300, 64, structure="mixed")
    method = build(case)
    # 0.5 instead of 1/8: a factor of 4, exact in floating point.
    expected = method.plan(q * 4, k).block_mask()
    assert torch.equal(method.plan(q, k, scale=0.5).block_mask(), expected)
    torch.testing.assert_close(method(q, k, v, scale=0.5), method(q * 4, k, v))


def test_geometry_of_another_shape_is_refused():
    q, k, v = make_qkv(2, 4, 2, 50, 32)
    geometry = Geometry(50, 50, 0, (0, 0, 3), (50, 50, 50))
    with pytest.raises(ValueError, match="the geometry is for"):
        build("pbs")(q, k, v, geometry=geometry)


def test_recorder_hears_what_each_call_did():
    q, k, v = make_qkv(1, 4, 2, 300, 32)
    heard = []
    method = build("pbs")
    method.recorder = heard.append
    method(q, k, v, layer_idx=3)
    method(q[:, :, :60], k[:, :, :60], v[:, :, :60])
    assert [(call.layer_idx, call.plan.reason) for call in heard] == [
        (3, ""),
        (None, "no more keys than segment_size=64"),
    ]
    assert torch.equal(heard[0].plan.density(), method.plan(q, k).density())

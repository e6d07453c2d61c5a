"""What every method must satisfy, whatever it selects."""

from types import SimpleNamespace

import pytest
import torch

from pbs import Geometry, block_sparse_attention
from pbs.methods import METHODS
from pbs.ops.block_selection import api, reference
from pbs.testing import assert_within_budget, make_qkv
from tests.methods.cases import CASES, build
from tests.ops.attention_truth import causal_mask, eager_attention, exact_attention

ALL = sorted(CASES)
# Blocks of the cases have 16, 32 or 64 tokens, segments 32 or 64, strides 8 or 16: multiples of all
# of these, and what divides none.
LENGTHS = [1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300, 1000]
PRECISIONS = [
    *((length, torch.float32) for length in LENGTHS),
    *((length, dtype) for dtype in (torch.bfloat16, torch.float16) for length in (1, 65, 300)),
]
SHAPES = [
    *((length, None) for length in (1, 63, 64, 65, 127, 128, 129, 300, 1000)),
    *((num_keys, num_queries) for num_keys in (65, 129, 1000) for num_queries in (1, 40, 64)),
]
# What a row computes depends on the rows after it at most: queries alone, with the keys before
# them, give what they give at the end of a whole prompt.
ROW_LOCAL = [
    *(
        (name, dict(facts.row_local_with))
        for name in METHODS
        if (facts := METHODS.load(name).facts) and facts.is_row_local
    ),
    *(
        (case, {})
        for case in ("streaming-tri", "pbs-shared", "pbs-none", "pbs-low_band", "pbs_plus-causal")
    ),
]


def dense_check(out, q, k, v):
    mask = causal_mask(q.shape[2], k.shape[2])
    scale = q.shape[3] ** -0.5
    assert_within_budget(
        out, eager_attention(q, k, v, mask, scale), exact_attention(q, k, v, mask, scale)
    )


@pytest.mark.parametrize(("num_keys", "dtype"), PRECISIONS, ids=str)
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


@pytest.mark.parametrize(("num_keys", "num_queries"), SHAPES)
@pytest.mark.parametrize("case", ALL)
def test_plan_is_causal_has_its_diagonal_and_moves_keys_only_in_segments(
    case, num_keys, num_queries
):
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
    q, k, v = make_qkv(1, 2, 1, 200, 64, structure="mixed")
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
def test_equal_keys_are_ties_that_every_run_breaks_alike(case):
    q, k, v = make_qkv(1, 4, 2, 300, 32)
    k[:] = 1.0
    method = build(case)
    plan = method.plan(q, k)
    assert torch.equal(plan.block_mask(), method.plan(q, k).block_mask())
    mask = plan.token_mask()
    # Equal weights: the mean of the values that are computed.
    mean = mask.double() @ v.repeat_interleave(2, 1).double() / mask.sum(-1, keepdim=True)
    torch.testing.assert_close(method(q, k, v).double(), mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ALL)
def test_one_overwhelming_key_is_found_and_everything_else_underflows(case):
    q, k, v = make_qkv(1, 4, 2, 300, 32)
    q[..., 5] = 1.0  # a dim of every rotary band
    k[:, :, 70, 5] = 1e4 * 32**0.5  # a logit of 1e4 from every query
    method = build(case)
    mask = method.plan(q, k).token_mask()
    out = method(q, k, v)
    scale = 32**-0.5
    assert_within_budget(
        out, eager_attention(q, k, v, mask, scale), exact_attention(q, k, v, mask, scale)
    )
    sees = mask[..., 70]
    expected = v[:, :, 70].repeat_interleave(2, 1)[:, :, None].expand_as(out)
    torch.testing.assert_close(out[sees], expected[sees])
    # StreamingLLM selects nothing, random blocks are drawn blindly, and FlexPrefill spends its
    # budget of one column on the sink.
    if not case.startswith("streaming") and case not in ("flexprefill", "random_blocks"):
        assert sees[..., 70:].all()


@pytest.mark.parametrize("num_queries", [64, 108])
@pytest.mark.parametrize(("case", "changes"), ROW_LOCAL, ids=[case for case, _ in ROW_LOCAL])
def test_last_queries_alone_compute_what_they_compute_in_a_whole_prompt(case, changes, num_queries):
    num_keys = num_queries + 256  # whole tiles before them
    q, k, v = make_qkv(1, 4, 2, num_keys, 32, structure="mixed")
    if case == "prism":
        # Its temperature is of all queries of a head: the same of both if they repeat.
        q = q[:, :, :32].repeat(1, 1, -(-num_keys // 32), 1)[:, :, :num_keys]
    method = build(case, **changes)
    last = q[:, :, -num_queries:]
    expected = method.plan(q, k).token_mask()[:, :, -num_queries:]
    assert torch.equal(method.plan(last, k).token_mask(), expected)
    whole = method(q, k, v)[:, :, -num_queries:]
    torch.testing.assert_close(method(last, k, v), whole, rtol=1e-4, atol=1e-5)


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


def test_short_prompts_run_dense_if_asked_to_and_say_so():
    q, k, v = make_qkv(1, 4, 2, 300, 32)
    heard = []
    method = build("pbs", dense_below=301)
    method.recorder = heard.append
    dense_check(method(q, k, v), q, k, v)
    assert heard[0].plan.reason == "fewer keys than dense_below=301"
    at_length = build("pbs", dense_below=300)
    torch.testing.assert_close(at_length(q, k, v), build("pbs")(q, k, v))
    for value, error in ((-1, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="dense_below must be"):
            build("pbs", dense_below=value)


@pytest.mark.parametrize("case", ALL)
def test_positions_past_32768_fit_where_tiles_are_int16(case, monkeypatch):
    """The Triton selection lists tiles in 16 bits, which their positions do not fit."""
    q, k, _ = make_qkv(1, 2, 1, 40000, 16, num_queries=300, structure="mixed")
    method = build(case)
    expected = method.plan(q, k).block_mask()

    def shortened(function):
        def call(*arguments, **options):
            blocks, counts = function(*arguments, **options)
            return blocks.to(torch.int16), counts

        return call

    names = ("list_blocks", "select_top_p_blocks", "select_pooled_blocks")
    short = SimpleNamespace(**{name: shortened(getattr(reference, name)) for name in names})
    backends = {"auto": short, "reference": reference}
    monkeypatch.setattr(api, "backend_module", lambda _, name, __: backends[name])
    assert torch.equal(method.plan(q, k).block_mask(), expected)

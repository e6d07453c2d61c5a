"""Coverage against a brute-force sum over the plan's token mask."""

from dataclasses import replace

import pytest
import torch

from experiments.gate.coverage import (
    UNNAMED_LAYER,
    CoverageProbe,
    measure_coverage,
    measure_plans,
    sample_rows,
)
from pbs import AttentionPlan, BlockGrid, CallRecord, build_method
from pbs.testing import make_qkv

SCALE = 32**-0.5


def brute_force(q, k, plan):
    """Probability on the plan's pairs of each query, fp64 [Z, Hq, Nq], N x N."""
    groups = q.shape[1] // k.shape[1]
    logits = q.double() @ k.double().repeat_interleave(groups, 1).transpose(-1, -2) * SCALE
    num_queries, num_keys = logits.shape[2:]
    positions = torch.arange(num_keys - num_queries, num_keys)[:, None]
    logits = logits.masked_fill(torch.arange(num_keys) > positions, float("-inf"))
    return (logits.softmax(-1) * plan.token_mask()).sum(-1)


METHODS = {
    "pbs": ("pbs", {"block_size": 32, "segment_size": 64, "threshold": 0.6}),
    "pbs-shared": (
        "pbs",
        {"block_size": 16, "segment_size": 64, "threshold": 0.5, "gqa": "shared"},
    ),
    "pbs-unordered": ("pbs", {"block_size": 32, "segment_size": 64, "order": "none"}),
    "meanpool": ("meanpool", {"block_size": 32, "threshold": 0.4}),
}
SHAPES = {
    "Z1-Hq4-Hkv4-N512": (1, 4, 4, 512, None),
    "Z2-Hq4-Hkv1-N333": (2, 4, 1, 333, None),
    "Z1-Hq4-Hkv2-Nq201-Nk500": (1, 4, 2, 500, 201),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("name", "params"), METHODS.values(), ids=METHODS)
def test_coverage_equals_brute_force(name, params, shape):
    batch, q_heads, kv_heads, num_keys, num_queries = shape
    q, k, _ = make_qkv(
        batch, q_heads, kv_heads, num_keys, 32, num_queries=num_queries, structure="mixed", seed=3
    )
    plan = build_method(name, **params).plan(q, k)
    expected = brute_force(q, k, plan)
    coverage = measure_coverage(q, k, plan, scale=SCALE, chunk_rows=50)
    torch.testing.assert_close(coverage, expected.mean(-1), rtol=0, atol=1e-6)
    assert coverage.max() < 0.999
    rows = [0, q.shape[2] - 1, 77, 78]
    some = measure_coverage(q, k, plan, scale=SCALE, heads=[3, 1], rows=rows)
    expected = expected[:, [3, 1]][:, :, rows].mean(-1)
    torch.testing.assert_close(some, expected, rtol=0, atol=1e-6)


def test_plans_for_the_same_tensors_share_one_pass():
    """Other tiles, moved queries, token rules and dense plans side by side."""
    q, k, _ = make_qkv(2, 4, 2, 333, 32, structure="mixed", seed=5)
    methods = [
        ("pbs", {"block_size": 32, "segment_size": 64, "threshold": 0.6}),
        ("pbs", {"block_size": 16, "segment_size": 64, "threshold": 0.3}),
        ("pbs", {"block_size": 32, "segment_size": 64, "threshold": 0.4, "target": "queries"}),
        ("flash", {}),
        ("streaming", {"n_init": 16, "n_local": 64, "block_size": 32}),
    ]
    plans = [build_method(name, **params).plan(q, k) for name, params in methods]
    expected = torch.stack([brute_force(q, k, plan).mean(-1) for plan in plans])
    together = measure_plans(q, k, plans, scale=SCALE, chunk_rows=50)
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-6)
    some = measure_plans(q, k, plans, scale=SCALE, heads=[2], rows=[300, 7, 120])
    for plan, coverage in zip(plans, some, strict=True):
        rows = brute_force(q, k, plan)[:, [2]][:, :, [7, 120, 300]]
        torch.testing.assert_close(coverage, rows.mean(-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_coverage_reads_every_dtype(dtype):
    q, k, _ = make_qkv(1, 2, 1, 300, 32, dtype=dtype, structure="vertical")
    plan = build_method("meanpool", block_size=32, threshold=0.5).plan(q, k)
    coverage = measure_coverage(q, k, plan, scale=SCALE)
    torch.testing.assert_close(coverage, brute_force(q, k, plan).mean(-1), rtol=0, atol=1e-5)


def hand_made_plan(num_queries=100, num_keys=132):
    """Unaligned windows, single columns, the token rule of A-shape heads: all a plan can say."""
    grid = BlockGrid(num_queries, num_keys, 32, 16)
    windows = torch.zeros(1, 2, 4, 4, dtype=torch.int32)
    num_windows = torch.full((1, 2, 4), 4, dtype=torch.int32)
    for tile in range(4):
        last = min((tile + 1) * 32 + 32, 132) - 16
        windows[..., tile, :] = torch.tensor([0, last - 32, last - 16, last])
    columns = torch.tensor([17, 18, 23], dtype=torch.int32).expand(1, 2, 4, 3).contiguous()
    num_columns = torch.tensor([[[0, 1, 2, 3], [0, 0, 3, 1]]], dtype=torch.int32)
    empty = torch.zeros(1, 2, 4, 0, dtype=torch.int32)
    return AttentionPlan(
        grid,
        1,
        2,
        empty,
        torch.zeros(1, 2, 4, dtype=torch.int32),
        windows,
        num_windows,
        columns=columns,
        num_columns=num_columns,
        local_window=torch.tensor([[4, 20], [16, 40]]),
    )


def test_coverage_follows_columns_unaligned_windows_and_the_token_rule():
    plan = hand_made_plan()
    q, k, _ = make_qkv(1, 2, 1, 132, 32, num_queries=100)
    coverage = measure_coverage(q, k, plan, scale=SCALE, chunk_rows=7)
    torch.testing.assert_close(coverage, brute_force(q, k, plan).mean(-1), rtol=0, atol=1e-6)


def test_coverage_follows_permuted_queries():
    q, k, _ = make_qkv(2, 2, 2, 256, 32, structure="vertical")
    plan = build_method("pbs", block_size=32, segment_size=64, threshold=0.5).plan(q, k)
    generator = torch.Generator().manual_seed(0)
    # Rows move inside their segment; the own segment whole is then a window for all of its tiles.
    local = torch.rand(2, 2, 4, 64, generator=generator).argsort(-1)
    query_order = (local + torch.arange(4)[:, None] * 64).flatten(-2)
    first = torch.arange(8) // 2 * 64
    windows = torch.stack([first, first + 32], dim=-1).int()[None, None]
    plan = replace(
        plan,
        windows=windows,
        num_windows=torch.full((1, 1, 8), 2, dtype=torch.int32),
        query_order=query_order,
    )
    expected = brute_force(q, k, plan)
    coverage = measure_coverage(q, k, plan, scale=SCALE)
    torch.testing.assert_close(coverage, expected.mean(-1), rtol=0, atol=1e-6)
    some = measure_coverage(q, k, plan, scale=SCALE, rows=[5, 200])
    torch.testing.assert_close(some, expected[:, :, [5, 200]].mean(-1), rtol=0, atol=1e-6)


def test_computing_everything_covers_everything():
    q, k, _ = make_qkv(1, 2, 1, 400, 32, structure="mixed")
    dense = build_method("flash").plan(q, k)
    assert torch.equal(measure_coverage(q, k, dense, scale=SCALE), torch.ones(1, 2).double())
    # Not marked as dense, so really measured.
    plan = build_method("pbs", block_size=32, segment_size=64, threshold=1.0).plan(q, k)
    assert not plan.is_dense
    coverage = measure_coverage(q, k, plan, scale=SCALE)
    torch.testing.assert_close(coverage, torch.ones(1, 2).double(), rtol=0, atol=1e-6)
    assert coverage.max() <= 1


def test_a_pair_named_twice_is_an_error():
    plan = hand_made_plan()
    q, k, _ = make_qkv(1, 2, 1, 132, 32, num_queries=100)
    twice = replace(plan, columns=torch.full_like(plan.columns, 3) + torch.arange(3))
    with pytest.raises(ValueError, match="named more than once"):
        twice.token_mask()
    with pytest.raises(ValueError, match="named more than once"):
        measure_coverage(q, k, twice, scale=SCALE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": [4]}, r"heads must be one or more numbers in \[0, 4\)"),
        ({"heads": []}, "heads must be"),
        ({"rows": [300]}, r"rows must be one or more numbers in \[0, 300\)"),
        ({"rows": [-1]}, "rows must be"),
        ({"chunk_rows": 0}, "chunk_rows must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    q, k, _ = make_qkv(1, 4, 2, 300, 32)
    plan = build_method("meanpool", block_size=32).plan(q, k)
    with pytest.raises(ValueError, match=message):
        measure_coverage(q, k, plan, scale=SCALE, **changes)


def test_a_plan_of_other_shapes_is_refused():
    q, k, _ = make_qkv(1, 4, 2, 300, 32)
    plan = build_method("meanpool", block_size=32).plan(q[:, :2], k)
    with pytest.raises(ValueError, match=r"the plan is for .* \(1, 2, 300, 300\)"):
        measure_coverage(q, k, plan, scale=SCALE)


def test_sampled_rows_are_spread_seeded_and_end_with_the_last():
    rows = sample_rows(1000, 16, seed=1)
    assert rows == sample_rows(1000, 16, seed=1) != sample_rows(1000, 16, seed=2)
    assert rows[-1] == 999
    assert [row * 16 // 1000 for row in rows] == list(range(16))
    assert sample_rows(7, 7) == list(range(7))
    for num_rows in (0, 8):
        with pytest.raises(ValueError, match=r"num_rows must lie in \[1, 7\]"):
            sample_rows(7, num_rows)


def test_probe_records_through_a_method():
    method = build_method("pbs", block_size=32, segment_size=64, threshold=0.5)
    probe = CoverageProbe(layers=[0, 2])
    method.recorder = probe
    expected = {}
    for layer in range(3):
        q, k, v = make_qkv(1, 4, 2, 300, 32, structure="mixed", seed=layer)
        method(q, k, v, layer_idx=layer)
        expected[layer] = brute_force(q, k, method.plan(q, k)).mean(-1)
        # A decoding step does not count.
        method(q[:, :, -1:], k, v, layer_idx=layer)
    assert list(probe.per_layer()) == [0, 2]
    for layer in (0, 2):
        torch.testing.assert_close(probe.per_head()[layer], expected[layer], rtol=0, atol=1e-6)
    mean = float(torch.stack([expected[0], expected[2]]).mean())
    assert probe.mean() == pytest.approx(mean, abs=1e-6)
    probe.reset()
    with pytest.raises(ValueError, match="no coverage was measured"):
        probe.mean()


def test_probe_gathers_calls_of_a_layer_and_samples_rows():
    q, k, _ = make_qkv(2, 4, 2, 2048, 32, structure="mixed")
    plan = build_method("pbs", block_size=64, threshold=0.5).plan(q, k)
    record = CallRecord(None, q, k, SCALE, plan)
    exact, sampled = CoverageProbe(), CoverageProbe(heads=[1, 2], num_rows=256)
    for _ in range(2):
        exact(record)
        sampled(record)
    assert exact.per_head()[UNNAMED_LAYER].shape == (4, 4)
    assert sampled.per_head()[UNNAMED_LAYER].shape == (4, 2)
    chosen = exact.per_head()[UNNAMED_LAYER][:, [1, 2]]
    torch.testing.assert_close(sampled.per_head()[UNNAMED_LAYER], chosen, rtol=0, atol=0.03)


def test_probe_keeps_no_tensor_of_the_call():
    q, k, _ = make_qkv(1, 2, 2, 128, 32)
    q.requires_grad_()
    probe = CoverageProbe()
    probe(CallRecord(0, q, k, SCALE, build_method("meanpool", block_size=32).plan(q, k)))
    kept = probe.per_head()[0]
    assert not kept.requires_grad
    assert kept.numel() == 2


def test_a_probe_tells_rows_apart():
    q, k, _ = make_qkv(1, 2, 2, 256, 32, structure="mixed")
    plan = build_method("meanpool", block_size=32, threshold=0.5).plan(q, k)
    whole, sampled = CoverageProbe(), CoverageProbe(num_rows=64)
    for probe in (whole, sampled):
        probe(CallRecord(0, q, k, SCALE, plan))
    expected = brute_force(q, k, plan)
    torch.testing.assert_close(whole.rows().double(), expected.flatten(), rtol=0, atol=1e-6)
    last = whole.rows(192, 256).double()
    torch.testing.assert_close(last, expected[..., 192:].flatten(), rtol=0, atol=1e-6)
    rows = torch.tensor(sample_rows(256, 64))
    torch.testing.assert_close(
        sampled.rows().double(), expected[..., rows].flatten(), rtol=0, atol=1e-6
    )
    whole.reset()
    with pytest.raises(ValueError, match="no coverage was measured of rows 0"):
        whole.rows()


def test_probe_refuses_no_rows():
    with pytest.raises(ValueError, match="num_rows must be at least 1"):
        CoverageProbe(num_rows=0)

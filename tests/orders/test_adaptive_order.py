"""Keys move only in the heads that gain; judged on generated heads and on the embedded model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from experiments.gate.coverage import measure_coverage
from pbs import build_method
from pbs.ops.grid import BlockGrid
from pbs.orders import adaptive
from pbs.orders.adaptive import AdaptiveOrder, Arrangement, sample_rows
from pbs.orders.base import moved_heads
from pbs.testing import make_qkv
from tests.methods.equal_coverage import LEVELS, plan_coverage, query_tile_masses, sweep
from tests.ops.attention_truth import causal_mask

TINY = Path(__file__).resolve().parents[2] / "experiments" / "tiny"
PARAMS = {"block_size": 64, "segment_size": 128}


def assert_never_worse_than_the_better_fixed_order(calls, **params):
    """At most 1 % at every level, per head and with one threshold; returns gains over moving."""
    fixed = [sweep(calls, order=order, **params) for order in ("none", "last_block")]
    chosen = sweep(calls, order="adaptive", **params)
    gains = []
    for level in LEVELS:
        pairs = zip(*(run.at(level) for run in (*fixed, chosen)), strict=True)
        for natural, permuted, density in pairs:
            assert density <= 1.01 * min(natural, permuted), (level, natural, permuted, density)
            gains.append(1 - density / permuted)
    return gains


def generated(structure):
    return [(*make_qkv(1, 6, 2, 2048, 64, structure=structure)[:2], 64**-0.5)]


@pytest.mark.parametrize("selector", ["meanpool", "antidiagonal"])
def test_on_generated_heads_density_at_equal_coverage_is_that_of_the_better_order(selector):
    gains = {
        structure: assert_never_worse_than_the_better_fixed_order(
            generated(structure), selector=selector, **PARAMS
        )
        for structure in ("vertical", "slash", "mixed")
    }
    # Better on average than always permuting.
    assert np.mean(list(gains.values())) > 0.001, gains


def captured_calls():
    transformers = pytest.importorskip("transformers")
    from experiments.benches.needle_tasks import encode, make_sample
    from experiments.report.pictures.capture import capture_call

    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY).eval()
    calls = {}
    for task in ("single", "copy"):
        sample = make_sample(task, length=2048, depth=0.4, index=0, seed=7, tokenizer=tokenizer)
        input_ids = torch.tensor(encode(sample, tokenizer))
        for layer in range(model.config.num_hidden_layers):
            call = capture_call(model, input_ids, build_method("flash"), layer=layer)
            calls.setdefault(layer, []).append((call.q, call.k, call.scale))
    return calls


@pytest.mark.skipif(not (TINY / "model.safetensors").exists(), reason="no trained checkpoint")
def test_on_the_embedded_model_density_at_equal_coverage_is_that_of_the_better_order():
    calls = captured_calls()
    gains = [
        np.mean(assert_never_worse_than_the_better_fixed_order(layer, **PARAMS))
        for layer in calls.values()
    ]
    # Some of its heads look at fixed distances: there permuting costs.
    assert max(gains) > 0.005


@pytest.mark.parametrize("gqa", ["per_query_head", "shared"])
def test_each_head_gets_the_plan_of_the_order_it_chose(gqa):
    q, k, v = make_qkv(2, 6, 2, 1000, 32, structure="mixed")
    params = {"block_size": 32, "segment_size": 64, "threshold": 0.8, "gqa": gqa}
    plans = {
        order: build_method("pbs", order=order, **params).plan(q, k)
        for order in ("none", "last_block", "adaptive")
    }
    chosen = plans["adaptive"]
    assert chosen.order.shape[1] == (2 if gqa == "shared" else 6)
    moved = moved_heads(chosen.order)
    moved = moved.repeat_interleave(6 // moved.shape[1], dim=1)[..., None, None]
    expected = torch.where(moved, plans["last_block"].block_mask(), plans["none"].block_mask())
    assert torch.equal(chosen.block_mask(), expected)
    expected = torch.where(moved[..., 0], plans["last_block"].key_order(), torch.arange(1000))
    assert torch.equal(chosen.key_order(), expected)
    out = build_method("pbs", order="adaptive", **params)(q, k, v)
    fixed = [
        build_method("pbs", order=order, **params)(q, k, v) for order in ("none", "last_block")
    ]
    torch.testing.assert_close(out, torch.where(moved, fixed[1], fixed[0]), rtol=1e-4, atol=1e-5)


def test_heads_with_vertical_lines_move_and_heads_with_slashes_stay():
    method = build_method("pbs", order="adaptive", selector="antidiagonal", **PARAMS)
    q, k, _ = make_qkv(1, 6, 2, 2048, 64, structure="vertical")
    assert moved_heads(method.plan(q, k).order).all()
    # Sharp lines only: rotated copies of one vector, a few tokens back.
    angles = torch.arange(2048.0)[:, None] * torch.linspace(0.05, 3, 32)
    k = torch.cat([angles.cos(), angles.sin()], -1)[None, None] * 3
    q = k.roll(400, dims=2).expand(-1, 2, -1, -1)
    plan = build_method("pbs", order="adaptive", selector="oracle", **PARAMS).plan(q, k)
    assert not moved_heads(plan.order).any()


def fixed_arrangement(order, mass_first, grid):
    """A selector that ranks blocks by a given score."""
    probabilities = mass_first.softmax(-1).expand(1, 1, grid.num_query_tiles, -1)
    forced = torch.zeros(1, 1, 1, grid.num_key_tiles, dtype=torch.bool)
    return Arrangement(order, probabilities, forced)


@pytest.mark.parametrize("threshold", [0.3, 0.7, 1.0])
def test_equal_arrangements_move_nothing(threshold):
    q, k, _ = make_qkv(1, 1, 1, 256, 16)
    grid = BlockGrid(256, 256, 32, 32)
    same = fixed_arrangement(torch.arange(256).view(1, 1, -1), torch.randn(8), grid)
    chosen = AdaptiveOrder().choose(
        q, k, Arrangement(None, same.probabilities, same.forced), same,
        scale=0.25, grid=grid, candidates=grid.past_tiles(segment_size=64), threshold=threshold,
    )  # fmt: skip
    assert torch.equal(chosen[0, 0], torch.arange(256))


def test_the_decision_does_not_wait_for_the_device():
    q, k, _ = make_qkv(2, 4, 2, 300, 16)
    with FakeTensorMode() as mode:
        q, k = mode.from_tensor(q), mode.from_tensor(k)
        grid = BlockGrid(300, 300, 32, 32)
        order = torch.arange(300).expand(2, 4, -1)
        arrangement = fixed_arrangement(order, torch.randn(10), grid)
        probabilities = arrangement.probabilities.expand(2, 4, -1, -1)
        natural, permuted = (
            Arrangement(x, probabilities, arrangement.forced) for x in (None, order)
        )
        chosen = AdaptiveOrder().choose(
            q, k, natural, permuted,
            scale=0.25, grid=grid, candidates=grid.past_tiles(segment_size=64), threshold=0.9,
        )  # fmt: skip
    assert chosen.shape == (2, 4, 300)


@pytest.mark.parametrize("max_scores", [1, 1 << 25])
@pytest.mark.parametrize("num_queries", [300, 77])
def test_sampled_masses_are_exact(monkeypatch, num_queries, max_scores):
    monkeypatch.setattr(adaptive, "MAX_SCORES", max_scores)
    q, k, _ = make_qkv(2, 4, 2, 300, 16, num_queries=num_queries, structure="mixed")
    grid = BlockGrid(num_queries, 300, 32, 32)
    method = build_method("pbs", block_size=32, segment_size=64)
    order = method.plan(q, k).order
    rows = sample_rows(num_queries, 40)
    logits = (q.double() @ k.repeat_interleave(2, 1).double().transpose(-1, -2)) * 0.25
    weights = logits.masked_fill(~causal_mask(num_queries, 300), float("-inf")).softmax(-1)
    weights = weights[:, :, rows]
    none = torch.zeros(1, 1, 1, grid.num_key_tiles, dtype=torch.bool)
    permuted = Arrangement(order, torch.zeros(2, 4, 1, 1), none)
    positions = (rows + grid.offset).expand(2, 4, -1)
    for head in range(2):
        group = adaptive._Group.of(head, q, k, permuted)
        masses = group.block_masses(rows, positions, scale=0.25, grid=grid)
        for mass, index in zip(masses, (torch.arange(300).expand_as(order), order), strict=True):
            moved = weights.gather(-1, index.unsqueeze(2).expand_as(weights))[:, group.heads]
            blocks = torch.nn.functional.pad(moved, (0, 20)).unflatten(-1, (-1, 32)).sum(-1)
            torch.testing.assert_close(mass, blocks.float())


def test_a_walk_tells_what_each_threshold_covers():
    q, k, _ = make_qkv(1, 2, 1, 256, 16, structure="vertical")
    method = build_method("pbs", block_size=32, segment_size=64, order="none")
    tiles = query_tile_masses(q, k, 0.25, 32)
    grid = BlockGrid(256, 256, 32, 32)
    candidates = grid.past_tiles(segment_size=64)
    probabilities = method._selector.block_probabilities(
        q, k, scale=0.25, grid=grid, candidates=candidates
    )
    rows = torch.arange(256)
    group = adaptive._Group.of(
        0, q, k, Arrangement(rows.expand(1, 2, -1), probabilities, probabilities)
    )
    masses, _ = group.block_masses(rows, rows.expand(1, 2, -1), scale=0.25, grid=grid)
    forced = (torch.arange(8) == 0)[None, None, None]
    entry, covered = adaptive._walk(
        probabilities[:, :, rows // 32], forced, masses, candidates[rows // 32]
    )
    for threshold in (0.3, 0.6, 0.9):
        plan = build_method(
            "pbs", block_size=32, segment_size=64, order="none", threshold=threshold
        ).plan(q, k, scale=0.25)
        count = (entry < threshold).sum(-1)
        assert torch.equal(count[0] // 32, plan.num_blocks.sum(-1)[0])
        coverage = covered.gather(-1, count[..., None] - 1)[0, :, 0]
        torch.testing.assert_close(coverage.float(), plan_coverage(tiles, plan, 64))


def test_coverage_of_the_sweeps_is_exact():
    q, k, _ = make_qkv(1, 4, 2, 300, 32, structure="mixed")
    plan = build_method("pbs", block_size=32, segment_size=64, threshold=0.5).plan(q, k)
    expected = measure_coverage(q, k, plan, scale=32**-0.5)
    coverage = plan_coverage(query_tile_masses(q, k, 32**-0.5, 32), plan, 64)
    torch.testing.assert_close(coverage.double()[None], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("num_queries", "num_rows"), [(1000, 64), (64, 64), (10, 64), (7, 3)])
def test_sampled_rows_are_spread_over_the_queries(num_queries, num_rows):
    rows = sample_rows(num_queries, num_rows)
    assert len(rows) == min(num_queries, num_rows)
    edges = torch.arange(len(rows)) * num_queries / len(rows)
    assert ((rows >= edges.floor()) & (rows < edges + num_queries / len(rows))).all()
    # Not always at the same place of a block.
    assert num_queries < 1000 or len((rows % 16).unique()) > 8

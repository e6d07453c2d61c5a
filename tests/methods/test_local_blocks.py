"""``local_blocks``: of its own segment a query computes what scores, in natural order."""

import pytest
import torch

from experiments.gate.coverage import measure_coverage
from pbs import BlockGrid, build_method
from pbs.ops.grid import candidate_tiles
from pbs.ops.plan import AttentionPlan, own_tiles
from pbs.orders.base import sink_first
from pbs.selectors import build_selector
from pbs.selectors.own import OwnKeys
from pbs.selectors.sampled import SampledSelector
from pbs.testing import make_qkv

SCALE = 32**-0.5
SIZES = {"block_size": 32, "segment_size": 128}


def test_tiles_of_the_own_segment_are_windows_and_the_others_blocks():
    grid = BlockGrid(256, 256, 32, 32)
    # The last query tile, 7, has tiles 4 to 6 in its own segment; 6 is computed in any case.
    blocks = torch.zeros(1, 1, 8, 3, dtype=torch.int16)
    blocks[0, 0, 7] = torch.tensor([1, 4, 0])
    num_blocks = torch.tensor([[[0] * 7 + [2]]], dtype=torch.int32)
    plan = AttentionPlan.from_lists(blocks, num_blocks, grid, segment_size=128, local_tiles=1)
    assert plan.num_blocks[0, 0].tolist() == [0] * 7 + [1]
    assert plan.num_windows[0, 0].tolist() == [1, 2, 2, 2, 1, 2, 2, 3]
    assert plan.windows[0, 0, 7, :3].tolist() == [128, 192, 224]
    assert plan.windows[0, 0, 4, :1].tolist() == [128]


def test_queries_that_begin_inside_a_tile_have_all_of_it():
    grid = BlockGrid(40, 200, 32, 32)  # the first query stands at 160, the last at 199
    own = own_tiles(grid, torch.device("cpu"), segment_size=64, local_tiles=5)
    assert (own.starts.tolist(), own.limits.tolist(), own.ends.tolist()) == ([4, 6], [4, 6], [6, 7])
    grid = BlockGrid(40, 190, 32, 32)  # at 150, inside tile 4: tile 5 is its last one
    own = own_tiles(grid, torch.device("cpu"), segment_size=64, local_tiles=0)
    assert (own.limits.tolist(), own.ends.tolist()) == ([4, 5], [6, 6])


def test_token_0_comes_first_and_the_others_keep_their_order():
    order = torch.tensor([[[2, 1, 0, 3, 5, 4], [0, 3, 2, 1, 4, 5]]])
    assert sink_first(order, 4).tolist() == [[[0, 2, 1, 3, 5, 4], [0, 3, 2, 1, 4, 5]]]


@pytest.mark.parametrize("selector", ["oracle", "antidiagonal", "meanpool"])
def test_scores_in_two_orders_are_those_of_each_and_sum_to_one(selector):
    q, k, _ = make_qkv(1, 4, 2, 300, 32, structure="mixed")
    grid = BlockGrid(300, 300, 32, 32)
    method = build_method("pbs", **SIZES, order="spread", local_blocks=1)
    moved = k.gather(2, method.plan(q, k).order[..., None].expand(-1, -1, -1, 32)[:, ::2])
    candidates, _ = candidate_tiles(grid, q.device)
    is_moved, num_moved = candidate_tiles(grid, q.device, segment_size=128)
    own = OwnKeys(k, 64, num_moved=num_moved)
    params = {} if selector == "meanpool" else {"normaliser": "causal"}
    built = build_selector(selector, params)
    settings = {"scale": SCALE, "grid": grid, "candidates": candidates}
    scores, covered = built.arranged_scores(q, moved, own=own, **settings)
    natural, _ = built.block_scores(q, k, own=None, **settings)
    is_own = candidates & ~is_moved
    assert torch.equal(scores[..., is_own], natural[..., is_own])
    total = scores.sum(-1) + (0 if covered is None else covered)
    has_any = candidates.any(-1) if covered is None else torch.ones(10, dtype=torch.bool)
    torch.testing.assert_close(total[..., has_any], torch.ones_like(total[..., has_any]))
    if selector == "oracle":
        sampled = SampledSelector(stride=1, power=1.0, share=0.0)
        again, credited = sampled.arranged_scores(q, moved, own=own, **settings)
        torch.testing.assert_close(again, scores, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(credited, covered, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("threshold", [0.7, 0.8, 0.9, 0.98])
def test_the_threshold_of_pbs_calibrated_is_a_coverage(threshold):
    q, k, _ = make_qkv(1, 4, 2, 1024, 32, structure="mixed", seed=1)
    method = build_method("pbs_calibrated", **SIZES, threshold=threshold)
    plan = method.plan(q, k, scale=SCALE)
    assert float(measure_coverage(q, k, plan, scale=SCALE).mean()) > threshold - 0.02


def test_long_segments_cost_no_more_than_what_scores():
    q, k, _ = make_qkv(1, 4, 2, 1024, 32, structure="mixed", seed=1)
    whole = build_method("pbs_calibrated", block_size=32, segment_size=512, local_blocks=None)
    chosen = build_method("pbs_calibrated", block_size=32, segment_size=512)
    densities = [float(one.plan(q, k).density().mean()) for one in (whole, chosen)]
    assert densities[1] < densities[0]


def test_moved_queries_have_no_natural_order():
    with pytest.raises(ValueError, match="needs target='keys'"):
        build_method("pbs", local_blocks=1, target="queries")
    with pytest.raises(ValueError, match="local_blocks"):
        build_method("pbs", local_blocks=-1)

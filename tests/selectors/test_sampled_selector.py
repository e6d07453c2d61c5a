"""Sampled exact scores: the oracle where nothing is left out, a coverage, and its protection."""

import pytest
import torch

from experiments.gate.coverage import measure_coverage
from pbs import BlockGrid, build_method
from pbs.ops.grid import candidate_tiles
from pbs.ops.tile_masses import tile_masses
from pbs.selectors.oracle import OracleSelector
from pbs.selectors.own import OwnKeys
from pbs.selectors.sampled import SampledSelector
from pbs.testing import make_qkv

SCALE = 32**-0.5


def scores_of(selector, num_queries=300, num_keys=300):
    q, k, _ = make_qkv(2, 4, 2, num_keys, 32, structure="mixed")
    q = q[:, :, -num_queries:]
    grid = BlockGrid(num_queries, num_keys, 32, 32)
    candidates, _ = candidate_tiles(grid, q.device, segment_size=64)
    own = OwnKeys.of(k, grid, segment_size=64)
    return selector.block_scores(q, k, scale=SCALE, grid=grid, candidates=candidates, own=own)


@pytest.mark.parametrize("num_queries", [300, 77])
def test_all_rows_and_the_plain_mean_are_the_exact_mass(num_queries):
    ours, covered = scores_of(SampledSelector(stride=1, power=1.0, share=0.0), num_queries)
    exact, exact_covered = scores_of(OracleSelector(normaliser="causal"), num_queries)
    torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(covered, exact_covered, atol=1e-5, rtol=1e-4)


def test_any_setting_keeps_what_a_row_holds_in_all():
    plain, covered = scores_of(SampledSelector(stride=8, power=1.0, share=0.0))
    for settings in ({"power": 4.0, "share": 0.0}, {"power": 4.0, "share": 0.5}):
        joined, credited = scores_of(SampledSelector(stride=8, **settings))
        torch.testing.assert_close(joined.sum(-1), plain.sum(-1), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(credited, covered, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(joined, plain)


def test_a_block_that_one_row_needs_outranks_one_that_all_want_a_little():
    mass = torch.tensor([[0.02, 0.1, 0.88]] * 7 + [[0.6, 0.1, 0.3], [9.0, 9.0, 9.0]])
    one, limit = torch.tensor([8]), torch.tensor([2])
    mean, power = (
        tile_masses(mass.log()[None, None, None], one, limit, power=power)[0, 0, 0, :2]
        for power in (1.0, 4.0)
    )
    assert mean[0] < mean[1]
    assert power[0] > power[1]
    assert float(power.sum()) == pytest.approx(float(mean.sum()))


@pytest.mark.parametrize("threshold", [0.7, 0.9, 0.98])
def test_the_threshold_is_a_coverage(threshold):
    settings = {"block_size": 32, "segment_size": 64, "selector": "sampled", "order": "spread"}
    params = {"selector_params": {"stride": 4, "power": 1.0, "share": 0.0}}
    method = build_method("pbs", threshold=threshold, **settings, **params)
    q, k, _ = make_qkv(1, 4, 2, 512, 32, structure="mixed", seed=1)
    plan = method.plan(q, k, scale=SCALE)
    coverage = float(measure_coverage(q, k, plan, scale=SCALE).mean())
    assert coverage > threshold - 0.02


def test_wrong_settings_are_refused():
    for settings, message in (
        ({"stride": 0}, "stride"),
        ({"power": 0.5}, "power"),
        ({"group": 3}, "group"),
        ({"share": 2.0}, "share"),
    ):
        with pytest.raises(ValueError, match=message):
            SampledSelector(**settings)

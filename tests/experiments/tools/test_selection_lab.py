"""The lab's defaults are the library's method, and everything that was tried runs."""

from dataclasses import replace

import pytest
import torch

from experiments.tools.selection_lab.method import Lab
from experiments.tools.selection_lab.variants import VARIANTS, parse, published
from pbs import build_method
from pbs.ops.dense import dense_attention
from pbs.testing import make_qkv

BUDGETS = {"head", "layer"}


def test_its_defaults_decide_as_the_library_does():
    q, k, _ = make_qkv(1, 4, 2, 2048, 32, structure="mixed")
    ours = build_method("pbs_calibrated", threshold=0.8).plan(q, k)
    plan = Lab(level=0.8).plan(q, k)
    assert torch.equal(plan.key_order(), ours.key_order())
    same = plan.block_mask() == ours.block_mask()
    assert same.float().mean() > 0.999
    assert ours.density().max() < 0.9


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_runs(name):
    q, k, v = make_qkv(1, 2, 1, 1536, 16, structure="mixed")
    variant = replace(VARIANTS[name], segment=512, level=0.5)
    plan = variant.plan(q, k)
    plan.validate()
    assert 0 < float(plan.density().mean()) < 1
    if variant.rule in BUDGETS:
        assert float(plan.density().mean()) == pytest.approx(0.5, abs=0.05)
    assert variant(q, k, v).isfinite().all()


@pytest.mark.parametrize("settings", ["summaries=1", "slashes=1"])
def test_with_everything_covered_nothing_stands_in(settings):
    q, k, v = make_qkv(1, 2, 1, 1024, 16, structure="mixed")
    out = replace(parse(settings), segment=256, level=1.0 - 1e-9)(q, k, v)
    torch.testing.assert_close(out, dense_attention(q, k, v, scale=0.25), atol=1e-4, rtol=1e-4)


def test_the_librarys_methods_are_beside():
    assert {"pbs", "pbs_calibrated", "xattention", "minference"} <= set(published())


def test_what_could_be_skipped_is_counted_and_what_it_would_cost():
    from experiments.tools.selection_lab.skipping import Counter, skipped

    largest = torch.tensor([[0.0, -9.0, 5.0, -4.0], [-1.0, -8.0, 1.0, -3.0]])
    masses = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    seen = torch.zeros(2)
    count, lost = skipped(largest, masses, seen, factor=1e-3, sorts=False)
    assert count == 1  # the second tile; e^-4 of the last is more than 1e-3 to the second row
    assert torch.equal(lost, masses[:, 1])
    count, lost = skipped(largest, masses, seen, factor=0.05, sorts=True)
    assert count == 2  # after the third tile the first row cares for no other
    torch.testing.assert_close(lost, masses[:, 1] + masses[:, 3])

    q, k, v = make_qkv(1, 2, 1, 3000, 32, structure="mixed")
    method = build_method("pbs", threshold=0.6)
    method.recorder = counter = Counter()
    method(q, k, v, layer_idx=1)
    assert counter.selected > 0
    assert counter.counts[False, 1e-4] <= counter.counts[False, 1e-2] <= counter.selected
    for key in counter.counts:
        assert 0 <= counter.total[key] <= counter.rows * counter.worst[key] + 1e-9
        assert counter.worst[key] <= key[1] * 3000  # the bound

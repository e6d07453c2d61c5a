"""MeanPooling, XAttention and FlexPrefill against arrays recorded from the originals."""

import pytest
import torch

from pbs import BlockGrid, build_method
from pbs.ops.antidiagonal import antidiagonal_block_sums
from tests.methods.recorded import causal_part, load, recordings

NAMES = recordings(["small_base_a"], ["base_a", "base_b", "base_c"])


@pytest.mark.parametrize("name", NAMES)
def test_meanpool_tiles_equal_the_original(name):
    recorded = load(name)
    method = build_method("meanpool", block_size=recorded["block_size"], threshold=0.9)
    mask = method.plan(recorded["q"], recorded["k"]).block_mask()
    assert torch.equal(mask, causal_part(recorded["meanpool_mask"]))


@pytest.mark.parametrize(("stride", "threshold"), [(8, 0.9), (16, 0.8)])
@pytest.mark.parametrize("name", NAMES)
def test_xattention_sums_and_tiles_equal_the_original(name, stride, threshold):
    recorded = load(name)
    q, k, size = recorded["q"], recorded["k"], recorded["block_size"]
    grid = BlockGrid(q.shape[2], k.shape[2], size, size)
    sums = antidiagonal_block_sums(q, k, stride=stride, scale=q.shape[3] ** -0.5, grid=grid)
    expected = recorded[f"xattn_s{stride}_t{threshold}_sums"]
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-5)

    params = {"block_size": size, "stride": stride, "threshold": threshold}
    original = causal_part(recorded[f"xattn_s{stride}_t{threshold}_mask"])
    quirk = build_method("xattention", first_chunk="reference", **params).plan(q, k).block_mask()
    assert torch.equal(quirk, original)
    # The paper's own rule needs fewer blocks and never another one (baselines.md, quirk A).
    minimal = build_method("xattention", **params).plan(q, k).block_mask()
    assert not (minimal & ~original).any()
    assert (original & ~minimal).any()


@pytest.mark.parametrize(("gamma", "tau"), [(0.95, 0.1), (0.9, 0.0), (0.8, 0.6)])
@pytest.mark.parametrize("name", NAMES)
def test_flexprefill_tiles_equal_the_original(name, gamma, tau):
    recorded = load(name)
    method = build_method(
        "flexprefill",
        block_size=recorded["block_size"],
        gamma=gamma,
        tau=tau,
        budget_divisor=128,
        nan_as_vs=True,
    )
    mask = method.plan(recorded["q"], recorded["k"]).block_mask()
    assert torch.equal(mask, causal_part(recorded[f"flex_g{gamma}_t{tau}_mask"]))

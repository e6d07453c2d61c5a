"""What was recorded from the original implementation, see tests/data/oracle."""

import pytest
import torch

from pbs import build_method
from tests.methods.recorded import causal_part, load, recordings

ALL = ["pbs_a", "pbs_b", "pbs_c", "pbs_d"]


def method_of(recorded, **changes):
    params = {key: recorded[key] for key in ("block_size", "segment_size", "threshold")}
    return build_method("pbs", **{**params, **changes})


@pytest.mark.parametrize("name", recordings(["small_pbs_a"], [*ALL, "pbs_e"]))
def test_output_equals_the_original(name):
    recorded = load(name)
    method = method_of(recorded, pad_mean="reference")
    out = method(recorded["q"], recorded["k"], recorded["v"])
    torch.testing.assert_close(out, recorded["out"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", recordings(["small_pbs_a", "small_pbs_b"], ALL))
def test_key_order_and_tiles_equal_the_original(name):
    recorded = load(name)
    plan = method_of(recorded, pad_mean="reference").plan(recorded["q"], recorded["k"])
    assert torch.equal(plan.key_order(), recorded["key_indices"])
    assert torch.equal(plan.block_mask(), causal_part(recorded["block_mask"]))
    assert plan.density().mean().item() == pytest.approx(recorded["density"], abs=1e-6)


@pytest.mark.parametrize("name", recordings(["small_pbs_a"], ALL))
def test_mean_over_real_tokens_changes_the_last_partial_row_only(name):
    recorded = load(name)
    plan = method_of(recorded).plan(recorded["q"], recorded["k"])
    whole = recorded["q"].shape[2] // recorded["block_size"]
    expected = causal_part(recorded["block_mask"])
    assert torch.equal(plan.block_mask()[:, :, :whole], expected[:, :, :whole])
    out = method_of(recorded)(recorded["q"], recorded["k"], recorded["v"])
    rows = whole * recorded["block_size"]
    torch.testing.assert_close(out[:, :, :rows], recorded["out"][:, :, :rows], rtol=0, atol=1e-5)

"""One mask for several kernels: the same tiles, and no time for a wrong output."""

import json

import pytest
import torch

from experiments.timing.densities import ControlledDensity
from experiments.tools import same_mask
from experiments.tools.same_mask import flex_mask, main
from pbs import build_method
from pbs.testing import make_qkv


def test_flex_attention_gets_the_tiles_of_the_plan():
    q, k, _ = make_qkv(1, 4, 2, 1300, 32)
    method = ControlledDensity(method=build_method("meanpool"), target_density=0.5)
    plan = method.plan(q, k)
    mask = flex_mask(plan)
    assert torch.equal(mask.to_dense().bool(), plan.block_mask())
    own = torch.arange(plan.grid.num_key_tiles)
    assert torch.equal(mask.kv_indices[0, 0, :, 0].long(), own)  # what the causal rule is for
    with pytest.raises(NotImplementedError, match="natural order"):
        flex_mask(build_method("pbs", threshold=0.5).plan(q, k))


def test_every_kernel_is_checked_before_it_is_timed(tmp_path, monkeypatch, capsys):
    def makers(_):
        ours = same_mask._ours
        return {
            "ours": lambda plan, scale: ours("auto", plan, scale),
            "wrong": lambda plan, scale: ours("auto", plan, 2 * scale),
            "absent": lambda plan, scale: 1 / 0,
        }

    monkeypatch.setattr(same_mask, "makers", makers)
    sizes = ["--lengths", "512", "--density", "0.6", "--shape", "4/2/32", "--device", "cpu"]
    main([str(tmp_path / "out.json"), *sizes, "--rounds", "2"])
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["environment"]["source"]
    (record,) = results["records"]
    found = record["kernels"]
    assert len(found["ours"]["samples_ms"]) == 2
    assert found["ours"]["density"] == pytest.approx(0.6)
    assert found["wrong"]["failure"] == "incorrect"
    assert (found["absent"]["failure"], found["absent"]["median_ms"]) == ("unavailable", None)
    table = capsys.readouterr().out
    assert "| 512 | 0.600 |" in table
    assert "incorrect" in table

"""``bench=gate``: errors against exact attention, no times; what is wrong fails the run."""

import pytest

from experiments.benches.gate import GateBench
from experiments.report.table import make_rows

SIZES = ("bench=gate", "bench.shapes=[4/2/32,2/1/64]", "bench.lengths=[300]")


def test_the_gate_says_how_near_its_bound_a_method_comes(run):
    store = run("method=pbs", *SIZES)
    metrics = store.metrics()
    assert metrics["status"] == "finished"
    cells = metrics["results"]["cells"]
    assert [(cell["shape"], cell["length"]) for cell in cells] == [("4/2/32", 300), ("2/1/64", 300)]
    shares = [cell["error_share"] for cell in cells]
    assert all(0 < share < 1 for share in shares)
    assert metrics["results"]["total"]["error_share"] == max(shares)
    for record in store.samples():
        assert not [key for key in record["methods"]["pbs"] if "speed" in key or "median" in key]
    (row,) = make_rows([store.folder])
    assert row["dense_command"] is None  # there is nothing to pair an error with


def test_a_wrong_dense_kernel_fails_the_gate(run, monkeypatch):
    from experiments.timing import dense_kernels

    real = dense_kernels.dense_kernels

    def wrong(device):
        return {"cpu": lambda *args, **kw: real(device)["cpu"](*args, **kw) * 1.01}

    monkeypatch.setattr(dense_kernels, "dense_kernels", wrong)
    metrics = run("method=pbs", *SIZES).metrics()
    assert metrics["status"] == "failed"
    assert "4/2/32-N300-float32 cpu (incorrect" in metrics["error"]["message"]


def test_wrong_settings_are_explained():
    for settings, message in (({"shapes": []}, "shapes"), ({"lengths": [0]}, "positive")):
        with pytest.raises(ValueError, match=message):
            GateBench(**settings)

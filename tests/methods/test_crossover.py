from pathlib import Path

import pytest

from experiments.crossover import crossovers, main
from pbs import build_method
from pbs.methods import crossover
from pbs.methods.crossover import PACKAGED, find_crossover, read_table
from pbs.testing import make_qkv

RESULTS = Path(__file__).resolve().parents[2] / "experiments" / "results"


@pytest.fixture(autouse=True)
def forget():
    find_crossover.cache_clear()
    yield
    find_crossover.cache_clear()


def own_table(tmp_path, monkeypatch, **changes):
    row = {
        "device": "cpu",
        "q_heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "method": "pbs",
        "min_keys": 300,
        "setting": "test",
        "source": "abc",
        **changes,
    }
    path = tmp_path / "crossover.csv"
    path.write_text(",".join(row) + "\n" + ",".join(map(str, row.values())) + "\n")
    monkeypatch.setenv(crossover.VARIABLE, str(path))


def reason_of(length, **params):
    q, k, v = make_qkv(1, 4, 2, length, 16)
    method = build_method("pbs", block_size=32, segment_size=64, dense_below="auto", **params)
    heard = []
    method.recorder = heard.append
    method(q, k, v)
    return heard[0].plan.reason


def test_short_prompts_run_dense_by_the_measured_table(tmp_path, monkeypatch):
    own_table(tmp_path, monkeypatch)
    assert reason_of(299) == "fewer keys than the measured crossover 300"
    assert reason_of(300) == ""


def test_one_order_per_key_head_has_a_row_of_its_own(tmp_path, monkeypatch):
    own_table(tmp_path, monkeypatch, method="pbs shared")
    assert reason_of(200, gqa="shared") == "fewer keys than the measured crossover 300"
    with pytest.warns(UserWarning, match="no crossover was measured for pbs on cpu"):
        assert reason_of(200) == ""


def test_a_device_nobody_measured_runs_sparse_and_says_so():
    with pytest.warns(UserWarning, match="heads 4/2/16, so it runs sparse at every length"):
        assert reason_of(200) == ""


def test_a_broken_table_is_refused(tmp_path, monkeypatch):
    own_table(tmp_path, monkeypatch, min_keys="many")
    with pytest.raises(ValueError, match="is not a crossover table"):
        reason_of(200)


def test_wrong_values_are_refused():
    with pytest.raises(TypeError, match="an integer or 'auto', got 'often'"):
        build_method("pbs", dense_below="often")


def test_the_packaged_table_is_that_of_the_newest_results(tmp_path):
    newest = max(RESULTS.glob("h*_*"), key=lambda folder: folder.name)
    main([str(newest), "--out", str(tmp_path / "table.csv")])
    assert (tmp_path / "table.csv").read_text() == PACKAGED.read_text()
    for row in read_table(PACKAGED):
        assert row.min_keys > 0


def test_results_without_single_calls_tell_no_crossover():
    results = {"environment": {"device": "x", "commit": "y"}, "parts": {"ttft": []}}
    with pytest.raises(ValueError, match="no part of these results"):
        crossovers(results)

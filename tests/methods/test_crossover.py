import json
from pathlib import Path

import pytest

from experiments.timing.result_folders import newest_folders, read_folder
from experiments.tools.measure_crossover import crossovers, main
from pbs import build_method
from pbs.methods import crossover
from pbs.methods.crossover import PACKAGED, find_crossover, read_table, setting_of
from pbs.testing import make_qkv

RESULTS = Path(__file__).resolve().parents[2] / "experiments" / "measured"


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
        "measured_keys": 512,
        "density": 0.5,
        "method_ms": 1.0,
        "dense_ms": 2.0,
        "num_samples": 5,
        "inputs": "test",
        "source": "abc",
        **changes,
    }
    path = tmp_path / "crossover.csv"
    path.write_text(",".join(row) + "\n" + ",".join(map(str, row.values())) + "\n")
    monkeypatch.setenv(crossover.VARIABLE, str(path))


def reason_of(length, **params):
    q, k, v = make_qkv(1, 4, 2, length, 16)
    method = build_method("pbs", dense_below="auto", **params)
    heard = []
    method.recorder = heard.append
    method(q, k, v)
    return heard[0].plan.reason


def test_short_prompts_run_dense_by_the_measured_table(tmp_path, monkeypatch):
    own_table(tmp_path, monkeypatch)
    assert reason_of(299) == "fewer keys than the measured crossover 300"
    assert reason_of(300) == ""


def test_one_order_per_key_head_has_a_row_of_its_own(tmp_path, monkeypatch):
    own_table(tmp_path, monkeypatch, method="pbs gqa=shared")
    assert reason_of(200, gqa="shared") == "fewer keys than the measured crossover 300"
    with pytest.warns(UserWarning, match="no crossover was measured for pbs on cpu"):
        assert not reason_of(299).startswith("fewer")


def test_another_setting_has_another_density_and_needs_a_row_of_its_own(tmp_path, monkeypatch):
    """At threshold 0.99 nearly everything is computed: the crossover of 0.9 says nothing."""
    own_table(tmp_path, monkeypatch)
    warning = r"no crossover was measured for pbs threshold=0.99 .* \(measured there: pbs\)"
    with pytest.warns(UserWarning, match=warning):
        assert not reason_of(299, threshold=0.99).startswith("fewer")
    # How a call is carried out is no setting of what it computes.
    assert reason_of(299, backend="reference").startswith("fewer")


def test_settings_are_named_by_what_differs_from_the_defaults():
    assert setting_of(build_method("pbs", dense_below=7)) == "pbs"
    found = setting_of(build_method("pbs", threshold=0.5, gqa="shared"))
    assert found.split()[0] == "pbs"
    assert set(found.split()) == {"pbs", "threshold=0.5", "gqa=shared"}
    assert setting_of(build_method("minference", preset="llama31-v2")).startswith(
        "minference preset=llama31-v2"
    )


def test_a_device_nobody_measured_runs_sparse_and_says_so():
    with pytest.warns(UserWarning, match="heads 4/2/16, so it runs sparse at every length"):
        assert not reason_of(299).startswith("fewer")


def test_a_broken_table_is_refused(tmp_path, monkeypatch):
    own_table(tmp_path, monkeypatch, min_keys="many")
    with pytest.raises(ValueError, match="is not a crossover table"):
        reason_of(200)


def test_wrong_values_are_refused():
    with pytest.raises(TypeError, match="an integer or 'auto', got 'often'"):
        build_method("pbs", dense_below="often")


def test_the_packaged_table_is_that_of_the_newest_results(tmp_path):
    folders = newest_folders(RESULTS, part="selection")
    main([*(str(folder.path) for folder in folders), "--out", str(tmp_path / "table.csv")])
    assert (tmp_path / "table.csv").read_text() == PACKAGED.read_text()


def test_every_packaged_row_is_of_the_methods_own_density():
    """PBS had the paper's densities, 0.22 to 0.58, the others their own, 0.8."""
    folders = {one.device: one for one in newest_folders(RESULTS, part="selection")}
    rows = read_table(PACKAGED)
    assert {"pbs", "pbs gqa=shared", "xattention"} <= {row.method for row in rows}
    for row in rows:
        (record,) = (
            one
            for one in folders[row.device].parts["selection"]
            if one["length"] == row.measured_keys
        )
        assert record["target_density"] is None
        densities = {round(e.get("density") or 0, 4) for e in record["methods"].values()}
        assert row.density in densities
        assert row.min_keys > 0
        assert (row.method_ms < row.dense_ms) == (row.min_keys <= row.measured_keys)


def cell(length, speed_up, *, density=None):
    entry = {
        "median_ms": 1.0,
        "samples_ms": [1.0] * 6,
        "dropped_ms": [],
        "density": 0.8,
        "dense_reason": "",
    }
    dense = {"median_ms": speed_up, "samples_ms": [speed_up] * 6, "dropped_ms": []}
    return {
        "length": length,
        "q_heads": 8,
        "kv_heads": 2,
        "head_dim": 64,
        "structure": "mixed",
        "sharpness": 1.0,
        "target_density": density,
        "dense": {"flash": dense},
        "methods": {"pbs shared": entry, "mine": dict(entry)},
    }


def results(folder, device, *cells, part="selection", commit="new"):
    folder.mkdir()
    text = json.dumps(
        {
            "environment": {"device": device, "time": "2027", "commit": commit},
            "methods": {"mine": {"method": "pbs", "params": {"threshold": 0.7}}},
            "parts": {part: cells},
        }
    )
    (folder / "results.json").write_text(text)
    return str(folder)


def test_a_setting_is_measured_at_the_density_it_has(tmp_path):
    folder = results(tmp_path / "a", "A100", cell(4096, 0.5), cell(16384, 2.0))
    shared, own = crossovers(read_folder(tmp_path / "a"))
    assert (shared.method, own.method) == ("pbs gqa=shared", "pbs threshold=0.7")
    assert (own.min_keys, own.measured_keys, own.density) == (8192, 16384, 0.8)
    assert (own.method_ms, own.dense_ms, own.num_samples) == (1.0, 2.0, 6)
    assert own.inputs == "mixed inputs, sharpness 1"
    assert folder


def test_rows_of_other_devices_settings_and_heads_stay(tmp_path, capsys):
    table = tmp_path / "table.csv"
    first = results(tmp_path / "a", "A100", cell(4096, 2.0), commit="old")
    main([first, "--out", str(table)])
    second = results(tmp_path / "b", "H100", cell(4096, 2.0), commit="old")
    main([second, "--out", str(table)])
    again = results(tmp_path / "c", "A100", cell(8192, 2.0))
    main([again, "--out", str(table)])
    found = [(row.device, row.method, row.min_keys, row.source) for row in read_table(table)]
    assert found == [
        ("A100", "pbs gqa=shared", 8192, "new"),
        ("A100", "pbs threshold=0.7", 8192, "new"),
        ("H100", "pbs gqa=shared", 4096, "old"),
        ("H100", "pbs threshold=0.7", 4096, "old"),
    ]
    assert "4 rows" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["ttft", "table7"])
def test_results_at_a_density_that_was_set_tell_no_crossover(tmp_path, part):
    results(tmp_path / "a", "A100", cell(4096, 2.0, density=0.5), part=part)
    with pytest.raises(ValueError, match="no part of these results tells a crossover"):
        crossovers(read_folder(tmp_path / "a"))

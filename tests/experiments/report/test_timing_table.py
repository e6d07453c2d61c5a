"""What a timing command ends with; cells without the memory they need are results."""

import json

import pandas as pd
import pytest
import torch

from experiments.files import to_json
from experiments.report.timing_table import (
    timing_columns,
    timing_notes,
    timing_numbers,
    write_table7,
)
from experiments.store import RunStore
from experiments.timing.published import TABLE7
from experiments.timing.timing_report import failures_of, summarise_times
from pbs.methods.base import AttentionMethod

QUICK = ("bench.seconds=0.01", "bench.min_rounds=1", "bench.max_rounds=1", "check=false")
OPS = ("bench=attention", "bench.shapes=[2/1/32]", "logger.mode=disabled", *QUICK)


@pytest.fixture
def _too_long_for_memory(monkeypatch):
    """Methods run out of memory at 600 tokens and beyond."""
    call = AttentionMethod.__call__

    def limited(self, q, *args, **kwargs):
        if q.shape[2] >= 600:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return call(self, q, *args, **kwargs)

    monkeypatch.setattr(AttentionMethod, "__call__", limited)


def metrics_of(tmp_path, bench):
    return [json.loads(p.read_text()) for p in sorted(tmp_path.glob(f"outputs/{bench}/*/*/*/m*"))]


@pytest.mark.usefixtures("_too_long_for_memory")
def test_a_sweep_goes_on_where_memory_ends(command, tmp_path):
    words = ("-m", "method=pbs", "method.threshold=0.5,0.9", *OPS, "bench.lengths=[300,600]")
    status, printed = command(*words)
    assert status == 0, printed
    assert printed.count("out of memory at 600 tokens: CUDA out of memory. Tried") == 2
    found = metrics_of(tmp_path, "attention")
    assert [one["status"] for one in found] == ["finished"] * 2
    for one in found:
        short, long = one["results"]["cells"]
        assert short["prefill_seconds"] > 0
        assert (long["failure"], long["prefill_seconds"]) == ("out of memory", None)
    status, printed = command(*words)
    assert status == 0
    assert printed.count("nothing to do") == 2


@pytest.mark.usefixtures("_too_long_for_memory")
def test_a_run_without_any_time_has_failed(command, tmp_path):
    words = ("method=pbs", *OPS, "bench.lengths=[600,700]")
    status, printed = command(*words)
    assert status == 1
    (found,) = metrics_of(tmp_path, "attention")
    assert found["status"] == "failed"
    assert "2 parts failed" in found["error"]["message"]
    assert found["results"]["total"]["num_failed"] == 2
    assert "out of memory at 700 tokens" in printed


@pytest.mark.usefixtures("_too_long_for_memory")
def test_a_prefill_without_memory_is_a_result_too(command, tmp_path):
    words = ("method=pbs", "bench=ttft", "model=tiny", "logger.mode=disabled", *QUICK)
    status, printed = command(*words, "bench.lengths=[300,700]")
    assert status == 0, printed
    (found,) = metrics_of(tmp_path, "ttft")
    assert [cell.get("failure") for cell in found["results"]["cells"]] == [None, "out of memory"]


def test_a_model_that_does_not_fit_fails_its_cell_only(command, tmp_path, monkeypatch):
    import experiments.run.runner as runner

    load, calls = runner.load_model, []

    def first_without_memory(config):
        calls.append(config)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return load(config)

    monkeypatch.setattr(runner, "load_model", first_without_memory)
    words = ("-m", "method=flash,pbs", "bench=ttft", "model=tiny", "logger.mode=disabled", *QUICK)
    status, _ = command(*words, "bench.lengths=[300]")
    assert status == 1
    flash, pbs = metrics_of(tmp_path, "ttft")
    assert (flash["status"], flash["error"]["type"]) == ("failed", "OutOfMemoryError")
    assert pbs["status"] == "finished"


def entry(milliseconds, **more):
    timing = {"p20_ms": milliseconds, "p80_ms": milliseconds, "samples_ms": [milliseconds]}
    return {"median_ms": milliseconds, **timing, **more}


def record(length, milliseconds, dense_milliseconds, *, density=0.3, failure=None):
    ours = {"median_ms": None, "failure": failure, "message": "why"}
    if failure is None:
        over = dense_milliseconds / milliseconds
        ours = entry(
            milliseconds,
            density=density,
            dense_reason="",
            relative_error=1e-3,
            peak_bytes=2**30,
            floor_ms=milliseconds / 2,
            speed_up={"flash": over},
            speed_up_over_fastest=over,
            stages_ms={"order": 1.0, "selection": 2.0, "gather": 0.5, "attention": 9.0},
        )
    return {
        "sample_id": f"N{length}",
        "length": length,
        "q_heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "dtype": "bfloat16",
        "target_density": density,
        "fastest_dense": "flash",
        "dense": {"flash": entry(dense_milliseconds)},
        "methods": {"pbs": ours},
    }


def test_the_table_has_the_longest_cell_and_the_break_even():
    records = [
        record(8192, 20.0, 10.0),
        record(32768, 50.0, 100.0),
        record(65536, 0, 0, failure="e"),
    ]
    results = summarise_times(records)
    assert [cell.get("break_even") for cell in results["cells"]] == [16384, 16384, 16384]
    row = {"label": "pbs", "status": "finished", **timing_numbers(results)}
    columns = timing_columns([row])
    assert columns["tokens"] == ["32768"]
    assert columns["time, ms"] == ["50 (n = 1)"]
    assert columns["dense, ms"] == ["100 (flash)"]
    assert columns["speed-up"] == ["2.00x"]
    assert columns["samples"] == ["1"]
    assert any("few samples: 1" in note for note in timing_notes([row]))
    assert columns["break-even, tokens"] == ["16384"]
    assert columns["memory, MiB"] == ["1024"]
    assert "coverage, %" not in columns
    assert "accuracy, %" not in columns
    assert "no time: pbs: e at 65536 tokens: why" in timing_notes([row])


def test_table_7_of_the_paper_stands_beside_ours(tmp_path):
    folder = tmp_path / "pbs" / "abc"
    folder.mkdir(parents=True)
    records = [record(8192, 2.0, 1.8), record(5000, 1.0, 1.0), record(16384, 0, 7.0, failure="oom")]
    records[0]["target_density"], records[2]["target_density"] = 0.5793, 0.4851
    lines = "".join(to_json(one) + "\n" for one in records)
    (folder / "samples.jsonl").write_text(lines)
    assert len(RunStore(folder).samples()) == 3
    rows = [{"label": "pbs gqa=shared", "path": str(folder)}]
    assert write_table7(tmp_path, rows) == [tmp_path / "table7.md", tmp_path / "table7.csv"]
    table = pd.read_csv(tmp_path / "table7.csv")
    ours = table[table["kind"] == "method"].set_index("length")
    assert list(ours.index) == [8192, 16384]
    assert ours.loc[8192, "published_total_ms"] == TABLE7[0].total_ms
    assert ours.loc[8192, "median_ms"] == 2.0
    assert ours.loc[8192, "speed_up_flash"] == pytest.approx(0.9)
    assert ours.loc[16384, "failure"] == "oom"
    text = (tmp_path / "table7.md").read_text()
    assert "| tokens | density | samples |" in text
    assert "| 8192 | 0.579 |" in text
    assert "| 1.78, 2.99 |" in text
    assert write_table7(tmp_path, []) == []


def test_errors_fail_a_run_and_a_kernel_that_is_not_there_does_not():
    good = record(8192, 2.0, 1.8)
    good["dense"]["fa3"] = {"median_ms": None, "failure": "unavailable", "message": "no"}
    assert failures_of([good]) == {}
    wrong = {"median_ms": None, "failure": "incorrect", "message": "off"}
    good["dense"]["cudnn"] = wrong
    assert failures_of([good])["N=8192 cudnn"]["type"] == "incorrect"
    assert set(failures_of([record(512, 0, 1.0, failure="does not fit")])) == {"N=512 pbs"}

"""Runs: what they write, that they resume, that a failure is a result."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from experiments.gate import safety as gate
from experiments.gate.safety import GateError
from experiments.report import run_pictures
from experiments.run import runner
from experiments.settings.config import RunConfig
from experiments.settings.names import changed_parameters, describe
from experiments.store import RunStore
from pbs.methods import METHODS
from tests.experiments.conftest import without_times


def test_a_run_leaves_five_files_and_a_picture(compose_cell):
    store = RunStore(runner.run_cell(compose_cell("method=pbs")))
    names = {path.name for path in store.folder.iterdir()}
    assert {"config.yaml", "env.json", "samples.jsonl", "metrics.json", "run.log"} <= names
    assert store.folder.parts[-4:-1] == ("needle", "tiny", "pbs")
    metrics = store.metrics()
    assert metrics["status"] == "finished"
    assert metrics["partial"] is False
    assert metrics["results"]["total"]["num_samples"] == len(store.samples()) == 2
    assert metrics["results"]["total"]["coverage"] > 0.5
    env = json.loads((store.folder / "env.json").read_text())
    assert env["packages"]["torch"]
    assert str(store.folder) not in json.dumps(env)
    assert (store.folder / "attention_map.png").stat().st_size > 1000
    assert "finished in" in store.log_path.read_text()


def test_the_same_command_again_does_nothing_but_say_so(run, caplog):
    store = run("method=flash")
    before = {path: path.stat().st_mtime_ns for path in store.folder.glob("*.json*")}
    caplog.clear()
    assert run("method=flash").folder == store.folder
    assert "finished: 2 samples, nothing to do" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in store.folder.glob("*.json*")} == before


def test_resume_false_measures_again(run):
    store = run("method=flash")
    before = store.samples()
    run("method=flash", "resume=false")
    assert without_times(store.samples()) == without_times(before)
    assert store.samples() != before


def test_an_interrupted_run_continues_where_it_stopped(run, caplog):
    store = run("method=pbs")
    whole, metrics = store.samples(), store.metrics()
    first, second = store.samples_path.read_text().splitlines(keepends=True)
    store.samples_path.write_text(first + second[: len(second) // 2])
    store.metrics_path.unlink()
    caplog.clear()
    run("method=pbs")
    assert "1 of 2 samples done" in caplog.text
    assert store.samples()[0] == whole[0]
    assert without_times(store.samples()) == without_times(whole)
    assert (
        store.metrics()["results"]["total"]["accuracy"] == metrics["results"]["total"]["accuracy"]
    )


def stop_after_two_samples(words, project, folder, how):
    """Exit status of a command that got a signal, its samples, and what it said."""
    process = subprocess.Popen(
        [sys.executable, str(project / "run.py"), *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as in this process
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        samples = list(folder.glob("needle/tiny/pbs/*/samples.jsonl"))
        if samples and samples[0].read_bytes().count(b"\n") >= 2:
            break
        time.sleep(0.01)
    os.kill(process.pid, how)
    _, said = process.communicate()
    return process.returncode, samples[0], said


def test_a_killed_process_loses_no_sample_and_doubles_none(run, tmp_path, project):
    overrides = ["method=pbs", "bench.depths=[0.0,0.2,0.4,0.6,0.8,1.0]"]
    words = ["debug=fast", "check=false", f"paths.outputs={tmp_path}", *overrides]
    _, samples, _ = stop_after_two_samples(words, project, tmp_path, signal.SIGKILL)
    killed = samples.read_bytes()
    assert not (samples.parent / "metrics.json").exists(), "killed too late to test anything"
    store = run(*overrides)
    assert store.samples_path == samples
    assert store.samples_path.read_bytes().startswith(killed[: killed.rfind(b"\n") + 1])
    resumed = store.samples()
    assert len(store.samples_path.read_text().splitlines()) == len(resumed) == 12
    run(*overrides, "resume=false")
    assert without_times(resumed) == without_times(store.samples())


def test_ctrl_c_says_in_a_line_what_is_kept(tmp_path, project):
    words = ["debug=fast", "check=false", f"paths.outputs={tmp_path}", "method=pbs"]
    words.append("bench.depths=[0.0,0.2,0.4,0.6,0.8,1.0]")
    status, samples, said = stop_after_two_samples(words, project, tmp_path, signal.SIGINT)
    assert status == 130, said
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("stopped; needle · tiny · pbs")
    assert f"samples are kept in {samples.parent}; the same command continues" in last


def test_a_failure_is_recorded_and_tried_again(run, monkeypatch):
    def explode(*_, **__):
        raise MemoryError("no room for 3 GB")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "load_model", explode)
        store = run("method=flash")
    metrics = store.metrics()
    assert metrics["status"] == "failed"
    assert metrics["error"]["type"] == "MemoryError"
    assert metrics["error"]["message"].startswith("no room for 3 GB; out of memory: try ")
    assert "explode" in metrics["error"]["traceback"]
    assert "Traceback" in store.log_path.read_text()
    run("method=flash")
    assert store.metrics()["status"] == "finished"


def test_a_finished_result_stands_whatever_happens_to_its_pictures(run, monkeypatch, caplog):
    def explode(*_, **__):
        raise MemoryError("no room for 3 GB")

    store = run("method=flash")
    before = store.metrics()
    store.open()  # as of a process that was killed while it drew
    with monkeypatch.context() as patch:
        patch.setattr(runner, "load_model", explode)
        run("method=flash")
    assert "no room for 3 GB" in caplog.text
    assert store.metrics() == before
    assert not store.is_open


def test_the_gate_runs_once_per_method_and_its_report_is_kept(run):
    report = run("method=pbs", "check=true").metrics()["gate"]
    assert report["passed"]
    assert report["ran_sparse"]
    again = run("method=pbs", "check=true", "bench.depths=[0.1]").metrics()["gate"]
    assert again == report
    assert run("method=pbs", "bench.depths=[0.2]").metrics()["gate"] is None


def test_a_failed_gate_stops_the_run_with_the_reason(run, monkeypatch):
    def leak(*_, **__):
        raise GateError("future", 3, 0, "plans name keys after their query")

    monkeypatch.setattr(gate, "run_gate", leak)
    store = run("method=meanpool", "check=true")
    assert store.metrics()["status"] == "failed"
    assert "plans name keys after their query" in store.metrics()["error"]["message"]
    assert store.samples() == []


def test_a_picture_that_fails_costs_a_warning(compose_cell, monkeypatch, caplog):
    def explode(*_):
        raise ValueError("too few keys")

    monkeypatch.setitem(run_pictures.OF_A_RUN, "needle", explode)
    store = RunStore(runner.run_cell(compose_cell("method=pbs")))
    assert store.metrics()["status"] == "finished"
    assert "no picture of this run: too few keys" in caplog.text


def test_wrong_values_are_recorded_with_advice(run):
    error = run("method=pbs", "method.block_size=512").metrics()["error"]
    assert "segment_size must be a multiple of block_size" in error["message"]


def test_a_prompt_longer_than_the_model_takes_is_refused_before_running(run):
    store = run("method=flash", "bench.lengths=[512,65536]")
    assert "the model takes 32768 tokens" in store.metrics()["error"]["message"]
    assert store.samples() == []


def test_limit_marks_the_run_as_partial(run):
    metrics = run("method=flash", "bench.limit=1", "bench.depths=[0.0,1.0]").metrics()
    assert metrics["partial"] is True
    assert metrics["results"]["total"]["num_samples"] == 2


def test_a_run_is_paired_with_the_dense_run_of_the_same_samples(run):
    assert run("method=pbs").metrics()["against_dense"] is None
    dense = run("method=flash", "seed=3")
    paired = run("method=pbs", "seed=3").metrics()["against_dense"]
    assert paired["num_pairs"] == 2
    assert paired["hash"] == dense.folder.name
    assert run("method=meanpool", "seed=4").metrics()["against_dense"] is None


def test_labels_name_what_is_not_at_its_default(compose_cell):
    cfg = RunConfig.from_hydra(compose_cell("method=pbs", "method.threshold=0.5"))
    assert describe(cfg.method) == "pbs threshold=0.5"
    assert changed_parameters(METHODS, {"name": "pbs", "threshold": 0.9}) == {}


def test_unknown_bench_parameters_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'lengths'"):
        runner.build_bench({"name": "needle", "lenghts": [512]})

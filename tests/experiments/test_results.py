"""All runs as one table."""

import pytest

from experiments.results import COLUMNS, load, load_samples
from experiments.settings.environment import describe_environment


def test_no_runs_give_an_empty_table_with_columns(tmp_path):
    assert list(load(tmp_path / "nothing").columns) == list(COLUMNS)
    assert load(tmp_path).empty


def test_every_cell_is_a_row(run, tmp_path):
    run("method=pbs", "bench.lengths=[512,768]", "method.threshold=0.7")
    store = run("method=flash", "bench.lengths=[512,768]")
    frame = load(tmp_path)
    assert len(frame) == 8
    assert set(zip(frame["task"], frame["length"], strict=True)) == {
        (task, length) for task in ("single", "copy") for length in (512, 768)
    }
    ours = frame[frame["method"] == "pbs"]
    assert (ours["method.threshold"] == 0.7).all()
    assert (ours["bench"] == "needle").all()
    assert (frame["status"] == "finished").all()
    assert frame["num_samples"].sum() == 8
    assert frame[["accuracy", "density", "coverage", "prefill_seconds"]].notna().all().all()
    assert len(load_samples(store.folder)) == 4


def test_runs_without_a_result_are_named(run, tmp_path):
    run("method=flash")
    run("method=pbs", "method.block_size=512")
    interrupted = run("method=meanpool")
    interrupted.metrics_path.unlink()
    broken = run("method=flash", "seed=1")
    broken.metrics_path.write_text("{")
    with pytest.warns(UserWarning, match="3 runs without a result"):
        frame = load(tmp_path)
    assert set(frame["status"]) == {"finished"}
    everything = load(tmp_path, unfinished=True)
    assert sorted(set(everything["status"])) == ["broken", "failed", "finished", "interrupted"]
    failed = everything[everything["status"] == "failed"]
    assert failed["error"].str.contains("segment_size").all()


def test_the_commit_can_be_named_from_outside(monkeypatch):
    monkeypatch.delenv("PBS_COMMIT", raising=False)
    environment = describe_environment()
    assert (environment["is_dirty"] is None) == (environment["commit"] is None)
    monkeypatch.setenv("PBS_COMMIT", "abc123")
    environment = describe_environment()
    assert (environment["commit"], environment["is_dirty"]) == ("abc123", None)

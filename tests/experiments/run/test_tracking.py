"""W&B mirrors a run; whatever goes wrong with it, the run's own results are there."""

import time
from pathlib import Path
from typing import ClassVar

import pytest
import wandb

from experiments.run.tracking import Tracker
from experiments.settings.config import LoggerConfig, PathsConfig


def track(tmp_path, mode="offline"):
    tracker = Tracker(LoggerConfig(mode=mode), PathsConfig(wandb=str(tmp_path)))
    tracker.start("abc123", name="pbs", group="needle/tiny", kind="cell", config={"a": 1})
    tracker.log_sample({"correct": True, "density": 0.5, "text": "x"}, 1)
    tracker.finish({"accuracy": 1.0}, table=[{"task": "copy", "accuracy": 1.0, "more": [1]}])


def offline_runs(folder: Path):
    return sorted(folder.glob("wandb/offline-run-*"))


def test_an_offline_run_is_made_below_outputs_and_is_cheap(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    track(tmp_path / "warm-up")
    started = time.perf_counter()
    track(tmp_path / "outputs")
    assert time.perf_counter() - started < 10  # 0.6 s alone; other tests share the processors
    (folder,) = offline_runs(tmp_path / "outputs")
    assert list(folder.glob("run-abc123.wandb"))
    assert list(folder.glob("files/media/table/*.json"))
    assert not (tmp_path / "wandb").exists()


def test_disabled_writes_nothing(tmp_path):
    track(tmp_path, mode="disabled")
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_continues_its_wandb_run(run, tmp_path):
    store = run("method=pbs", "logger.mode=offline")
    store.metrics_path.unlink()
    store.samples_path.write_text(store.samples_path.read_text().splitlines(keepends=True)[0])
    time.sleep(1.1)  # W&B names its folders by the second
    run("method=pbs", "logger.mode=offline")
    folders = offline_runs(tmp_path)
    assert len(folders) == 2
    assert {folder.name.split("-")[-1] for folder in folders} == {store.folder.name}


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_broken_wandb_costs_one_warning(run, monkeypatch, caplog, where):
    class Broken:
        summary: ClassVar = {}

        def define_metric(self, *_, **__):
            pass

        def log(self, *_):
            if where == "log":
                raise RuntimeError("boom")

        def finish(self, **_):
            raise OSError("disk full")

    def init(**_):
        if where == "init":
            raise wandb.errors.UsageError("no login")
        return Broken()

    monkeypatch.setattr(wandb, "init", init)
    store = run("method=flash", "logger.mode=online")
    assert store.metrics()["status"] == "finished"
    assert len(store.samples()) == 2
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "results are on disk" in warnings[0].getMessage()

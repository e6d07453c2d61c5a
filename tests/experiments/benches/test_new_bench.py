"""A new bench is one file and one config: everything else follows from what it declares."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from experiments.report.figures import draw_pareto
from experiments.report.runs import read_results
from experiments.report.tables import paired_table, run_frame, score_table, wins
from experiments.results import load
from experiments.settings.bench_names import BENCHES
from experiments.tools.leaderboard import main as leaderboard

ROOT = Path(__file__).resolve().parents[3]
# A process of its own, which does not know the bench but by its registration.
PAGE = """
import sys
from experiments.settings.bench_names import BENCHES
BENCHES.register("toy", "tests.experiments.benches.toy:ToyBench")
from experiments.report.__main__ import main
sys.exit(main(["--outputs", sys.argv[1], "--out", sys.argv[2]]))
"""
CONFIG = "defaults:\n  - /schema/bench@_here_: toy\n"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return tmp_path_factory.mktemp("toy")


@pytest.fixture
def toy(command, monkeypatch, outputs):
    """``python run.py`` where the bench is registered and its config lies in a folder."""
    monkeypatch.setitem(BENCHES._entries, "toy", "tests.experiments.benches.toy:ToyBench")
    (outputs / "conf" / "bench").mkdir(parents=True, exist_ok=True)
    (outputs / "conf" / "bench" / "toy.yaml").write_text(CONFIG)
    words = (f"--config-dir={outputs / 'conf'}", "bench=toy", "check=false")
    folder = f"paths.outputs={outputs / 'outputs'}"
    return lambda *more: command(*words, folder, "bench.num_samples=4", *more)


@pytest.fixture
def swept(toy):
    """Status and output of a sweep; its finished runs are not repeated by the next test."""
    return toy("-m", "method=flash,meanpool,pbs")


def test_a_sweep_ends_with_its_table(swept, outputs):
    status, printed = swept
    assert status == 0, printed
    assert "loss, nats" in printed
    assert "difference to dense, nats" in printed
    assert "loss and difference 95 % intervals (Student; paired)" in printed
    assert "accuracy" not in printed
    summary = pd.read_csv(next((outputs / "outputs" / "toy").glob("*/summary.csv")))
    by = summary.set_index("method")
    assert by.loc["pbs", "difference"] > 0  # more loss than dense, and so worse
    assert by.loc["pbs", "low"] < by.loc["pbs", "difference"] < by.loc["pbs", "high"]
    assert by.loc["pbs", "loss_low"] < by.loc["pbs", "loss"] < by.loc["pbs", "loss_high"]
    assert by.loc["flash", "is_reference"]


def test_results_have_its_columns_and_cells(swept, outputs):
    frame = load(outputs / "outputs")
    assert {"loss", "loss_low", "loss_high", "density", "length"} <= set(frame)
    assert sorted(frame["length"].unique()) == [300, 600]
    assert (frame["num_samples"] == 4).all()


def test_report_and_notebooks_read_it(swept, outputs):
    (group,) = read_results(outputs / "outputs").groups
    assert group.has_answers
    assert "loss, nats" in score_table(group)
    paired = paired_table(group).set_index("method")
    assert paired.loc["pbs", "reading"] == "worse than dense"
    assert "difference, nats" in paired
    values = run_frame(group).set_index("method")["value"]
    best = min(("meanpool", "pbs"), key=values.get)
    assert wins(group)["cells won"].idxmax() == best
    figure = draw_pareto(group)
    assert figure.axes[0].get_ylabel() == "loss, nats"
    assert "better: down" in figure.get_suptitle()


def test_the_page_and_its_markdown_have_it(swept, outputs, tmp_path):
    command = [sys.executable, "-c", PAGE, str(outputs / "outputs"), str(tmp_path / "page")]
    subprocess.run(command, check=True, cwd=ROOT)
    for name in ("report.html", "report.md"):
        text = (tmp_path / "page" / name).read_text()
        assert "loss, nats" in text
        assert "difference to dense, nats" in text


def test_the_leaderboard_puts_the_least_first(swept, outputs, tmp_path):
    assert (
        leaderboard(["--outputs", str(outputs / "outputs"), "--out", str(tmp_path / "l.csv")]) == 0
    )
    with (tmp_path / "l.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["score_unit"] for row in rows} == {"loss, nats"}
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores)
    assert rows[0]["method"] == "flash"


def test_a_run_resumes_and_its_failure_is_the_exit_status(toy, outputs):
    assert toy("method=pbs", "seed=2")[0] == 0
    (samples,) = [
        path
        for path in (outputs / "outputs").glob("toy/*/pbs/*/samples.jsonl")
        if "seed: 2" in (path.parent / "config.yaml").read_text()
    ]
    before = samples.read_bytes()
    lines = before.splitlines(keepends=True)
    samples.write_bytes(b"".join(lines[:-1]))
    (samples.parent / "metrics.json").unlink()
    assert toy("method=pbs", "seed=2")[0] == 0
    again = samples.read_bytes().splitlines(keepends=True)
    assert again[:-1] == lines[:-1]
    assert json.loads(again[-1])["loss"] == json.loads(lines[-1])["loss"]
    status, printed = toy("method=pbs", "bench.lengths=[0]")
    assert status == 1
    assert "failed" in printed


def test_wandb_gets_its_numbers_and_samples(toy, monkeypatch):
    import wandb

    class Run:
        def __init__(self):
            self.summary, self.logged = {}, []

        def define_metric(self, *_, **__):
            pass

        def log(self, numbers, *_, **__):
            self.logged.append(numbers)

        def finish(self, **_):
            pass

    runs = []
    monkeypatch.setattr(wandb, "init", lambda **_: runs.append(Run()) or runs[-1])
    assert toy("method=pbs", "seed=1", "logger.mode=offline")[0] == 0
    cell, comparison = runs
    assert cell.summary["loss_low"] < cell.summary["loss"] < cell.summary["loss_high"]
    assert sum("sample/loss" in numbers for numbers in cell.logged) == 8
    assert comparison.summary["loss/pbs"] == cell.summary["loss"]

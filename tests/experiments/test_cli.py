"""The command line as a user meets it."""

import subprocess
import sys
import time

import pandas as pd
import pytest

from experiments.report.content import make_sections
from experiments.report.page import write_markdown
from experiments.report.runs import read_results
from experiments.results import load

FAST = ("debug=fast", "check=false", "paths.outputs=out")


def test_help_lists_groups_and_examples_within_three_seconds(project, tmp_path):
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(project / "run.py"), "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stderr
    for text in ("method", "flash", "pbs", "experiment", "demo", "Examples", "-m method="):
        assert text in done.stdout
    assert seconds < 3 * _slowness()
    assert list(tmp_path.iterdir()) == []


def test_importing_run_is_quick_and_leaves_torch_alone(project):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import run; "
        "heavy = {'torch', 'transformers', 'wandb', 'pandas', 'scipy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, str(project)], check=True)


def _slowness() -> float:
    """How much longer than alone things take now: other tests share the processors."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import hydra"], check=True)
    return max(1.0, (time.perf_counter() - started) / 0.3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=pbss"], "Did you mean 'pbs'"),
        (["method.thresold=0.5"], "Did you mean 'threshold'"),
        (["method.threshold=high"], "method.threshold must be a number, got 'high'"),
        (["metod=pbs"], "Did you mean 'method'"),
        (["bench=neddle"], "Did you mean 'needle'"),
        (["bench.task=[single]"], "Did you mean 'tasks'"),
        (["method=flash", "order=none"], "FlashAttention has no order"),
        (["method=pbs,flash"], "--multirun"),
        (["model=hf"], "add model.path="),
        (["logger.mode=no"], "offline, online, disabled"),
        (["debug=null"], "~GROUP"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_mistakes_are_explained_without_a_traceback(command, words, message):
    status, printed = command("paths.outputs=out", *words)
    assert status == 1
    assert message in printed
    assert "Traceback" not in printed


def test_a_sweep_with_a_failed_cell_finishes_the_others_and_says_so(command, tmp_path):
    status, printed = command(
        "-m", *FAST, "method=pbs", "method.block_size=64,512,128", "method.threshold=0.9"
    )
    assert status == 1
    assert "pbs block_size=512" in printed
    assert "segment_size must be a multiple of block_size" in printed
    assert "no dense run to compare with; make it with: python run.py method=flash" in printed
    table = pd.read_csv(tmp_path / "out/needle/tiny/summary.csv")
    assert table["status"].tolist() == ["finished", "failed", "finished"]
    assert (tmp_path / "out/needle/tiny/summary.md").read_text().count("\n| ") == 5
    assert (tmp_path / "out/needle/tiny/accuracy_density.png").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_sweep_ends_with_one_table_against_dense(command, tmp_path):
    status, printed = command("-m", *FAST, "method=flash,pbs")
    assert status == 0
    assert "reference" in printed
    assert "1.00x" in printed
    assert "no dense run" not in printed
    status, printed = command("-m", *FAST, "method=flash,pbs")
    assert status == 0
    assert printed.count("nothing to do") == 2
    status, printed = command(*FAST, "method=meanpool")
    assert status == 0
    assert "reference" in printed, "a single run is compared with the dense run on disk"


def test_the_command_for_the_dense_run_makes_it(command, tmp_path):
    _, printed = command(*FAST, "method=pbs", "seed=2")
    (line,) = [line for line in printed.splitlines() if "make it with" in line]
    words = line.partition("run.py ")[2].split()
    status, _ = command(*words, "check=false", "logger.mode=disabled")
    assert status == 0
    _, printed = command(*FAST, "method=pbs", "seed=2")
    assert "reference" in printed


def test_experiments_start_their_sweep_by_themselves(command):
    status, printed = command(
        "experiment=sweep_threshold",
        *FAST,
        "hydra.sweeper.params={method.threshold:'0.5,0.9'}",
        "bench.tasks=[copy]",
    )
    assert status == 0
    assert "pbs threshold=0.5" in printed


def test_a_table_says_on_what_its_coverage_was_measured(command, tmp_path):
    words = ("bench.depths=[0.0,1.0]", "bench.coverage_every=2", "bench.coverage_rows=16")
    status, printed = command("-m", *FAST, *words, "method=flash,pbs")
    assert status == 0
    basis = "coverage: 2 of 4 samples, layers 0, 1, all heads, at most 16 queries of each"
    assert basis in " ".join(printed.split())
    assert basis in (tmp_path / "out/needle/tiny/summary.md").read_text()
    results = read_results(tmp_path / "out")
    write_markdown(make_sections(results), tmp_path / "report.md")
    assert basis[1:] in (tmp_path / "report.md").read_text()
    assert set(load(tmp_path / "out")["num_coverage_samples"]) == {1}

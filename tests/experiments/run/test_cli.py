"""The command line as a user meets it."""

import os
import subprocess
import sys
import time

import pandas as pd
import pytest

from experiments.report.page import write_markdown
from experiments.report.runs import read_results
from experiments.report.sections import make_sections
from experiments.results import load
from experiments.run.cli import flags_first
from experiments.settings.config import ROOT

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
        (["debug=null"], "~debug"),
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


FLAGS = {
    "--multirun": ["--multirun"],
    "-m": ["--multirun"],
    "--cfg job": ["--cfg=job"],
    "-c hydra --resolve": ["--cfg=hydra", "--resolve"],
    "--cfg=job -p bench": ["--cfg=job", "--package=bench"],
    "--config-dir DIR": ["--config-dir=DIR"],
    "-cd DIR --config-name other": ["--config-name=other", "--config-dir=DIR"],
    "--config-path=DIR": ["--config-path=DIR"],
    "--experimental-rerun FILE": ["--experimental-rerun=FILE"],
    "--info": ["--info=all"],
    "-i defaults": ["--info=defaults"],
    "--hydra-help": ["--hydra-help"],
    "-r": ["--run"],
    "-sc": ["--shell-completion"],
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("flags", FLAGS)
def test_flags_may_stand_between_settings(flags, place):
    settings = ["method=pbs", "~logger"] if place < 2 else ["method=pbs", "+x.y=[1, 2]"]
    words = [*settings[:place], *flags.split(), *settings[place:]]
    if flags.endswith("--info") and place == 1:
        words = ["~logger", "--info", "method=pbs"]
        settings = ["~logger", "method=pbs"]
    assert flags_first(words) == [*FLAGS[flags], *settings]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=pbs", "--foo", "bench=needle"], "unrecognized arguments: --foo"),
        (["method=pbs", "--cfg", "jobs"], "choose from"),
        (["method=pbs", "--config-dir"], "--config-dir/-cd: expected one argument"),
        (["--config-dir", "/no/where", "method=pbs"], "'/no/where' not found"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_wrong_flags_are_explained(command, words, message):
    status, printed = command(*words)
    assert status == 1
    assert message in printed
    assert "usage:" not in printed


def test_hydra_shows_the_configuration_from_anywhere(command, tmp_path):
    (tmp_path / "own" / "bench").mkdir(parents=True)
    (tmp_path / "own" / "bench" / "mine.yaml").write_text("defaults: [needle]\nlengths: [640]\n")
    words = ["method=pbs", "--config-dir", str(tmp_path / "own"), "bench=mine"]
    status, printed = command(*words, "--cfg", "job", "seed=7", "-p", "bench", "check=false")
    assert status == 0
    assert "# @package bench" in printed
    assert "- 640" in printed


def test_a_key_that_a_file_sets_and_the_bench_lacks_is_named(command):
    status, printed = command("experiment=matched_coverage", "bench=longbench", "match.target=0.9")
    assert status == 1
    expected = "experiment/matched_coverage.yaml: unknown key of 'bench' (longbench): 'lengths'"
    assert expected in printed


@pytest.mark.parametrize(
    "words",
    [
        ("-m", *FAST, "method=flash,pbs", "hydra/launcher=submitit_slurm"),
        (*FAST, "bench=longbench", f"bench.data_dir={ROOT}/tests/data/longbench", "runner=slurm"),
    ],
    ids=["launcher", "runner"],
)
def test_what_needs_slurm_says_so_where_there_is_none(command, monkeypatch, words):
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
    status, printed = command(*words)
    assert status == 1
    printed = " ".join(printed.split())
    assert "slurm needs Slurm, whose srun is not on this machine's PATH" in printed
    assert "internal error" not in printed


def test_what_slurm_says_is_passed_on(command, monkeypatch, tmp_path):
    for name, code in (("srun", 0), ("sbatch", 1)):
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!/bin/sh\necho 'invalid partition specified: gpus' >&2\nexit {code}\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    status, printed = command("-m", *FAST, "method=flash,pbs", "hydra/launcher=submitit_slurm")
    assert status == 1
    assert "invalid partition specified: gpus" in printed
    assert "internal error" not in printed

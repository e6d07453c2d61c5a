"""Two processes on one cell, and sweeps over processes: all give what one process gives."""

import os
import re
import shlex
import signal
import subprocess
import sys

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from experiments.run.cli import register_configs
from experiments.settings.config import CONF, ROOT, RunConfig
from tests.reliability.commands import wait_for
from tests.reliability.outcome import cells, check_whole, outcome

CELL = ("debug=fast", "check=false", "method=pbs", "bench.depths=[0.0,0.2,0.4,0.6,0.8,1.0]")
NUM_SAMPLES = 12
SWEEP = ("-m", "debug=fast", "check=false", "method=flash,meanpool")


@pytest.fixture
def two(server, tmp_path):
    """The same command twice: the first is at its samples, the second was started then."""
    first = server.start(*CELL, folder=tmp_path)
    wait_for(lambda: num_lines(tmp_path) >= 1)
    second = server.start(*CELL, folder=tmp_path)
    wait_for(lambda: "another process works on" in second.printed)
    return first, second


def num_lines(folder):
    return sum((path / "samples.jsonl").read_bytes().count(b"\n") for path in cells(folder).values()
               if (path / "samples.jsonl").exists())  # fmt: skip


def test_a_second_process_waits_says_so_and_repeats_nothing(two, tmp_path):
    first, second = two
    assert first.wait().status == 0
    ended = second.wait()
    assert ended.status == 0
    assert f"finished: {NUM_SAMPLES} samples, nothing to do" in ended.printed
    check_whole(tmp_path)
    assert num_lines(tmp_path) == NUM_SAMPLES


def test_a_second_process_takes_over_when_the_first_is_killed(two, tmp_path):
    first, second = two
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait().status == -signal.SIGKILL
    ended = second.wait()
    assert ended.status == 0
    assert f"of {NUM_SAMPLES} samples done, continuing" in ended.printed
    check_whole(tmp_path)
    assert num_lines(tmp_path) == NUM_SAMPLES


@pytest.fixture(scope="module")
def serial(server, tmp_path_factory):
    """Folder of the sweep in one process."""
    folder = tmp_path_factory.mktemp("serial")
    ended = server.run(*SWEEP, folder=folder)
    assert ended.status == 0, ended.printed
    return folder


@pytest.mark.parametrize(
    "launcher",
    [
        ("joblib", "hydra.launcher.n_jobs=2"),
        # Half a minute for a second launcher of the same kind.
        pytest.param(("submitit_local", "hydra.launcher.timeout_min=10"), marks=pytest.mark.slow),
    ],
    ids=["joblib", "submitit_local"],
)
def test_a_launcher_gives_the_results_of_the_serial_sweep(launcher, serial, tmp_path):
    name, setting = launcher
    done = subprocess.run(
        [sys.executable, ROOT / "run.py", *SWEEP, f"hydra/launcher={name}", setting],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    check_whole(tmp_path)
    ours, theirs = outcome(tmp_path), outcome(serial)
    for result in (ours, theirs):
        # Which of two cells ended first decides whether the other is compared with it on disk;
        # the table at the end compares in any case.
        for cell in result.values():
            del cell["metrics"]["against_dense"]
    assert ours == theirs
    assert table(tmp_path).equals(table(serial))


def table(folder):
    (path,) = folder.glob("outputs/needle/tiny/summary.csv")
    frame = pd.read_csv(path)
    return frame[[column for column in frame if not is_a_time(column)]]


def is_a_time(column):
    return any(word in column for word in ("prefill", "seconds", "speed_up", "load", "path"))


def commands_of_the_page():
    """Every command of docs/scaling.md: words after run.py, of a sweep its first cell's."""
    text = (ROOT / "docs" / "scaling.md").read_text()
    for line in "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines():
        words = shlex.split(line, comments=True)
        if "run.py" not in line:  # installs packages, or loops over benches itself
            continue
        if "run.py" not in words:  # in a word that xargs hands to a shell
            words = shlex.split(words[-1].replace("VALUE", "0.5"))
        words = words[words.index("run.py") + 1 :]
        yield [word if "[" in word else word.split(",")[0] for word in words if word != "-m"]


@pytest.mark.parametrize("words", commands_of_the_page(), ids=" ".join)
def test_the_commands_of_the_page_name_what_there_is(words):
    register_configs()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("config", overrides=words, return_hydra_config=True)
        own = [word for word in words if not word.startswith("hydra")]
        assert RunConfig.from_hydra(compose("config", overrides=own)).method["name"]
    launchers = [word.partition("=")[2] for word in words if word.startswith("hydra/launcher=")]
    assert [cfg.hydra.runtime.choices["hydra/launcher"]] == (launchers or ["basic"])

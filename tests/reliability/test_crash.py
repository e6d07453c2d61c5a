"""kill -9 at random moments: what the last restart leaves is what an undisturbed run leaves."""

import contextlib
import os
import random
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from experiments.settings.config import ROOT
from experiments.store import RunStore
from tests.reliability import wandb_files
from tests.reliability.commands import OPENCOMPASS, wait_for
from tests.reliability.outcome import cells, check_half_done, check_whole, outcome

FAST = ("debug=fast", "check=false")
QUICK_TIMING = ("bench.seconds=0.01", "bench.min_rounds=1", "bench.max_rounds=1")
COMMANDS = {
    "needle": (*FAST, "method=pbs", "bench.depths=[0.0,1.0]", "logger.mode=offline"),
    "sweep": ("-m", *FAST, "method=flash,meanpool"),
    "opencompass": ("check=false", "logger.mode=disabled", "method=pbs", "bench=longbench",
                    f"bench.data_dir={ROOT / 'tests' / 'data' / 'longbench'}", "bench.limit=2",
                    "bench.tasks=[trec,passage_retrieval_zh]", "bench.max_out_len=2"),
    "attention": ("check=false", "logger.mode=disabled", "method=pbs", "bench=attention",
                  "bench.shapes=[2/1/32]", "bench.lengths=[300,600]",
                  "bench.densities=[0.7,0.9]", *QUICK_TIMING),
    "ttft": ("check=false", "logger.mode=disabled", "method=pbs", "bench=ttft",
             "bench.lengths=[128,256]", *QUICK_TIMING),
}  # fmt: skip


@dataclass
class Toll:
    """What happened to a command: kills by the clock, kills at a change of a file, and runs."""

    by_clock: int = 0
    by_file: int = 0
    folders: list = field(default_factory=list)

    @property
    def kills(self):
        return self.by_clock + self.by_file


@pytest.fixture(scope="session")
def undisturbed(server, tmp_path_factory):
    """Runs a command without disturbing it, once."""
    known = {}

    def undisturbed(name):
        if name not in known:
            if name == "opencompass":
                server.load(OPENCOMPASS)
            folder = tmp_path_factory.mktemp(f"undisturbed-{name}")
            ended = server.run(*COMMANDS[name], folder=folder)
            assert ended.status == 0, ended.printed
            check_whole(folder)
            known[name] = ended, outcome(folder)
        return known[name]

    return undisturbed


@pytest.fixture
def torment(server, undisturbed, tmp_path):
    """Runs a command, killing it again and again, until it comes to its end; and all that anew."""

    def torment(name, *, num_kills, of_a_run, seed):
        rng = random.Random(f"{name} {seed}")
        whole, expected = undisturbed(name)
        toll = Toll()
        while toll.kills < num_kills:
            folder = tmp_path / f"{name}{len(toll.folders)}"
            toll.folders.append(folder)
            most = min(num_kills, toll.kills + rng.randint(*of_a_run))
            _live(server, COMMANDS[name], folder, rng, whole, expected, toll, most)
            ended = server.run(*COMMANDS[name], folder=folder)
            assert ended.status == 0, ended.printed
            check_whole(folder)
            assert outcome(folder) == expected
        return toll

    return torment


def _live(server, words, folder, rng, whole, expected, toll, most):
    """Start the command and kill it, until it was fast enough or was killed often enough."""
    while toll.kills < most:
        if is_by_clock := rng.random() < 0.4:
            ended = server.run(*words, folder=folder, kill_after=rng.uniform(0, whole.seconds))
        else:
            ended = server.run(*words, folder=folder, kill_at=rng.randrange(whole.ticks))
        check_half_done(folder, expected)
        if ended.status == 0:  # it was over before its moment came
            return
        assert ended.status == -signal.SIGKILL, ended.printed
        toll.by_clock += is_by_clock
        toll.by_file += not is_by_clock


def check_tracking(folder, expected):
    """Every restart wrote to the one W&B run of the cell; the last one has every sample, once."""
    ((name, cell),) = expected.items()
    files = {path: records for path, records in wandb_files.runs(folder).items()
             if "comparison" not in path.name}  # fmt: skip
    for records in files.values():
        assert {r.run.run_id for r in records if r.HasField("run")} <= {name.split("/")[-1]}
    last = [records for records in files.values() if any(r.HasField("exit") for r in records)][-1]
    steps = [wandb_files.history(r, "num_done") for r in last if r.HasField("history")]
    samples = [r for r in last if wandb_files.history(r, "sample/density") is not None]
    assert len(samples) == len(cell["records"])
    assert set(steps) == set(range(1, len(samples) + 1))


@pytest.mark.parametrize("name", ["needle", "opencompass", "attention", "sweep"])
def test_a_killed_command_loses_nothing(torment, undisturbed, name):
    toll = torment(name, num_kills=2, of_a_run=(2, 2), seed=0)
    if name == "needle":
        for folder in toll.folders:
            check_tracking(folder, undisturbed(name)[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_killed_a_dozen_times_loses_nothing(torment, undisturbed, server, name, capsys):
    toll = torment(name, num_kills=12, of_a_run=(1, 5), seed=1)
    again = server.run(*COMMANDS[name], folder=toll.folders[-1])
    assert again.status == 0
    assert again.printed.count("nothing to do") == len(undisturbed(name)[1])
    if name == "needle":
        for folder in toll.folders:
            check_tracking(folder, undisturbed(name)[1])
    with capsys.disabled():
        print(
            f"\n{name}: {toll.by_clock} kills by the clock, {toll.by_file} at a change of a file, "
            f"{len(toll.folders)} runs, each equal to the undisturbed one"
        )


def test_pictures_that_a_kill_prevented_are_made_by_the_next_run(server, undisturbed, tmp_path):
    _, expected = undisturbed("attention")
    ended = server.run(*COMMANDS["attention"], folder=tmp_path, kill_at=".times.csv.")
    assert ended.status == -signal.SIGKILL
    (path,) = cells(tmp_path).values()
    assert RunStore(path).metrics()["status"] == "finished"
    assert not (path / "times.csv").exists()
    assert not (path / "speed_up.png").exists()
    ended = server.run(*COMMANDS["attention"], folder=tmp_path)
    assert "ended after its last sample, before its pictures" in ended.printed
    assert outcome(tmp_path) == expected


def test_killed_runs_leave_no_service_of_wandb(server, tmp_path):
    command = server.start(*COMMANDS["needle"], folder=tmp_path)
    wait_for(lambda: services_of(command.pid))
    os.kill(command.pid, signal.SIGKILL)
    assert command.wait().status == -signal.SIGKILL
    wait_for(lambda: not services_of(command.pid))


def services_of(pid):
    """Processes that W&B started beside the process ``pid`` and that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # ended meanwhile
            words = path.read_bytes().decode(errors="replace").split("\0")
            if words[0].endswith("wandb-core") and str(pid) in words:
                found.append(path.parent.name)
    return found

"""What a time is worth on a busy machine: the load of others, its warning, how threads wait."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import machine_load as load
from experiments.machine_load import LOADED, LoadMeter, load_warning, mean_load
from experiments.openmp import SPIN_COUNT
from experiments.settings.environment import describe_environment

STAT = """\
cpu  {total} 0 0 0 0 0 0 0 0 0
cpu0 {first} 0 0 0 0 0 0 0 0 0
cpu1 {second} 0 0 0 0 0 0 0 0 0
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of two processors whose counters and clock the test sets."""
    path = tmp_path / "stat"
    monkeypatch.setattr(load, "STAT", str(path))
    monkeypatch.setattr(load, "_processors", lambda: [0, 1])
    state = {"own": 0.0, "clock": 0.0}
    times = os.times()
    monkeypatch.setattr(
        load.os, "times", lambda: type(times)((state["own"], 0.0, 0.0, 0.0, state["clock"]))
    )
    monkeypatch.setattr(load.time, "monotonic", lambda: state["clock"])
    per_second = os.sysconf("SC_CLK_TCK")

    def passes(*, clock, own, busy):
        first = round(busy * per_second)
        path.write_text(STAT.format(total=9 * first, first=first, second=0))
        state.update(own=own, clock=clock)

    passes(clock=0.0, own=0.0, busy=0.0)
    return passes


def test_the_load_is_what_others_do_on_our_processors(machine):
    meter = LoadMeter()
    machine(clock=10.0, own=8.0, busy=12.0)  # 4 of 20 processor seconds are not ours
    assert meter.lap() == pytest.approx(0.2)
    machine(clock=20.0, own=8.0, busy=32.0)
    assert meter.lap() == 1.0


def test_a_system_that_does_not_tell_gives_none(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "STAT", str(tmp_path / "none"))
    meter = LoadMeter()
    assert meter.lap() is None
    assert mean_load([{"load": None}, {}]) is None
    assert load_warning(None) is None


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux")
def test_a_busy_process_is_seen():
    code = "import time\nend = time.time() + 30\nwhile time.time() < end: pass"
    others = [subprocess.Popen([sys.executable, "-c", code]) for _ in os.sched_getaffinity(0)]
    try:
        meter = LoadMeter()
        time.sleep(1.0)
        assert meter.lap() > LOADED
    finally:
        for other in others:
            other.kill()
            other.wait()


def test_a_loaded_machine_is_warned_of():
    assert load_warning(LOADED) is None
    assert "other processes kept 60% of the processors busy" in load_warning(0.6)
    assert mean_load([{"load": 0.5}, {"load": None}, {"load": 0.1}]) == pytest.approx(0.3)


PRINT = "import os; print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'))"


@pytest.mark.parametrize(
    ("first", "settings", "expected"),
    [
        ("", {}, f"{SPIN_COUNT} None"),
        ("", {"OMP_WAIT_POLICY": "ACTIVE"}, "None ACTIVE"),
        ("", {"GOMP_SPINCOUNT": "7"}, "7 None"),
        ("import torch; ", {}, "None None"),
    ],
    ids=["default", "a user's policy", "a user's count", "too late"],
)
def test_how_threads_wait_is_set_before_torch_is_loaded(project, first, settings, expected):
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    env = {key: value for key, value in os.environ.items() if key not in names}
    done = subprocess.run(
        [sys.executable, "-c", f"{first}import experiments.run.cli; {PRINT}"],
        cwd=project,
        env={**env, **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == expected


def test_how_threads_wait_stands_in_the_environment(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "77")
    assert describe_environment()["variables"]["GOMP_SPINCOUNT"] == "77"

"""A small outputs folder of real runs, made once for all test processes; and a browser."""

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from experiments.settings.config import CONF
from experiments.store import RunStore

NEEDLE = (
    "bench=needle",
    "bench.lengths=[512,1024]",
    "bench.tasks=[single,copy]",
    "bench.depths=[0.5]",
)
TIMES = (
    "bench.lengths=[256,512]",
    "bench.seconds=0.02",
    "bench.min_rounds=2",
    "bench.max_rounds=2",
)
CELLS = (
    ("method=flash", *NEEDLE),
    ("method=meanpool", *NEEDLE),
    ("method=pbs", *NEEDLE),
    ("method=pbs", "method.threshold=0.5", *NEEDLE),
    ("method=pbs", "bench=attention", "bench.shapes=[4/2/32]", *TIMES),
    ("method=meanpool", "bench=attention", "bench.shapes=[4/2/32]", *TIMES),
    ("method=pbs", "bench=ttft", *TIMES),
    ("method=meanpool", "bench=coverage", "bench.lengths=[512]", "bench.num_values=3"),
    ("method=pbs", "bench=coverage", "bench.lengths=[512]", "bench.num_values=3"),
)
INTERRUPTED = ("method=flash", "seed=1", *NEEDLE)


@pytest.fixture(scope="session")
def outputs(tmp_path_factory) -> Path:
    """Needle runs of three methods, times, coverage, and an interrupted run. Not to be changed."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one folder for all workers
        root = root.parent
    with (root / "outputs.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "outputs.made").exists():
            shutil.rmtree(root / "outputs", ignore_errors=True)
            make_runs(root / "outputs")
            (root / "outputs.made").touch()
    return root / "outputs"


@pytest.fixture
def own_outputs(outputs, tmp_path) -> Path:
    """A copy of them that a test may change."""
    return Path(shutil.copytree(outputs, tmp_path / "outputs"))


def make_runs(folder: Path) -> None:
    from experiments.run.runner import run_cell

    def run(*words: str) -> RunStore:
        common = ("model=tiny", "logger.mode=disabled", "check=false", f"paths.outputs={folder}")
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            return RunStore(run_cell(compose("config", overrides=[*common, *words])))

    for words in CELLS:
        assert run(*words).metrics()["status"] == "finished", words
    run(*INTERRUPTED).metrics_path.unlink()


@dataclass(frozen=True)
class Rendered:
    """A page as the browser has it.

    Attributes:
        dom: its document after loading, as HTML.
        console: messages of the console, errors and blocked requests among them.
        screenshot: a PNG.
    """

    dom: str
    console: list[str]
    screenshot: Path


@pytest.fixture
def browse(tmp_path) -> Callable[[Path], Rendered]:
    """Open a page in headless Chromium without any network."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        reason = (
            "no Chromium to open the report in: `apt-get install chromium` (Debian), or leave "
            "these tests out with `pytest -m 'not browser and not gpu and not slow'`"
        )
        # CI installs it, so that there it cannot go unnoticed.
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)

    def browse(page: Path) -> Rendered:
        screenshot = tmp_path / "page.png"
        words = [
            *(program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--disable-quic", "--no-first-run", "--disable-background-networking"),
            *("--disable-component-update", "--disable-sync", "--hide-scrollbars"),
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={tmp_path / 'profile'}",
            *("--window-size=1280,2400", "--enable-logging=stderr"),
            *("--dump-dom", f"--screenshot={screenshot}", page.as_uri()),
        ]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
        return Rendered(done.stdout, console, screenshot)

    return browse

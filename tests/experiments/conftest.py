"""Runs cells in this process: the embedded model, short prompts, no gate, no tracking."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from experiments.report import run_pictures
from experiments.run.cli import CollectCells, register_configs
from experiments.settings.config import CONF, ROOT
from experiments.store import RunStore

FAST = ("debug=fast", "check=false")


@pytest.fixture(scope="session", autouse=True)
def _configs_registered():
    register_configs()


@pytest.fixture
def compose_cell(tmp_path) -> Callable[..., DictConfig]:
    """Compose a configuration as the command line does, with outputs in ``tmp_path``."""

    def compose_cell(*overrides: str, fast: bool = True) -> DictConfig:
        words = [*(FAST if fast else ()), f"paths.outputs={tmp_path}", *overrides]
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            return compose("config", overrides=words)

    return compose_cell


@pytest.fixture
def _no_maps(monkeypatch):
    """Attention maps take longer than the rest of a short cell."""
    monkeypatch.delitem(run_pictures.OF_A_RUN, "needle")


@pytest.fixture
def run(compose_cell, _no_maps) -> Callable[..., RunStore]:
    """Run one cell; returns its folder's store."""
    from experiments.run.runner import run_cell

    def run(*overrides: str) -> RunStore:
        return RunStore(run_cell(compose_cell(*overrides)))

    return run


@pytest.fixture
def command(monkeypatch, tmp_path, capsys, _no_maps) -> Callable[..., tuple[int, str]]:
    """Run ``python run.py ...`` in this process; returns exit status and everything it printed."""

    def command(*words: str) -> tuple[int, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(ROOT / "run.py"), *words])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        _write_absl_messages_here()
        status = 0
        try:
            runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        finally:
            register_configs()
            CollectCells.folders.clear()
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return command


def _write_absl_messages_here() -> None:
    """Give absl's log handler, if something imported it, the stream of this test.

    When Hydra sets up logging the handler closes the stream it was made with, unless that is
    stderr: made under pytest, it is the one that pytest writes the whole session to.
    """
    if "absl.logging" in sys.modules:
        sys.modules["absl.logging"].get_absl_handler().python_handler.setStream(sys.stderr)


def without_times(records: list[dict]) -> list[dict]:
    """Records less what differs from run to run: times and what others do meanwhile."""
    return [
        {key: value for key, value in record.items() if not key.endswith(("seconds", "load"))}
        for record in records
    ]


@pytest.fixture
def project() -> Path:
    """Root of the project."""
    return ROOT

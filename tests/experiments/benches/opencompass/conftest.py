"""Cells on the embedded model and our own small data, without gate, tracking and network."""

from collections.abc import Callable

import pytest
from hydra import compose, initialize_config_dir

from experiments.settings.config import CONF, ROOT, RunConfig
from experiments.store import RunStore

DATA = ROOT / "tests" / "data"
LONGBENCH = DATA / "longbench"
LONGBENCH_V2 = DATA / "longbench_v2"
QUIET = ("check=false", "logger.mode=disabled")


@pytest.fixture
def compose_bench(tmp_path) -> Callable[..., RunConfig]:
    """Compose a configuration as the command line does, with outputs in ``tmp_path``."""

    def compose_bench(*overrides: str):
        words = [*QUIET, f"paths.outputs={tmp_path / 'outputs'}", *overrides]
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            return compose("config", overrides=words)

    return compose_bench


@pytest.fixture
def run_bench(compose_bench) -> Callable[..., RunStore]:
    """Run one cell in this process; returns its folder's store."""
    from experiments.run.runner import run_cell

    def run_bench(*overrides: str) -> RunStore:
        return RunStore(run_cell(compose_bench(*overrides)))

    return run_bench


@pytest.fixture
def run_longbench(run_bench) -> Callable[..., RunStore]:
    """Run LongBench tasks, two samples each unless told otherwise."""

    def run_longbench(*overrides: str, tasks: str = "trec,passage_retrieval_zh") -> RunStore:
        words = [
            "bench=longbench",
            f"bench.data_dir={LONGBENCH}",
            f"bench.tasks=[{tasks}]",
            "bench.limit=2",
            "bench.max_out_len=4",
        ]
        return run_bench(*words, *overrides)

    return run_longbench

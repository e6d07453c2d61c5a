"""More than one process: OpenCompass's runners, and one model over several processes."""

import json
import os
import subprocess
import sys

import pytest

from experiments.models.distributed import check_tensor_parallel
from experiments.settings.config import ConfigError
from experiments.settings.ranks import mean_over_ranks
from tests.experiments.benches.opencompass.conftest import LONGBENCH, QUIET
from tests.experiments.conftest import without_times

TASKS = ("bench=longbench", f"bench.data_dir={LONGBENCH}", "bench.limit=2", "bench.max_out_len=6")


def test_slurm_commands_are_shown_and_nothing_runs(run_bench, caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["bench.tasks=[trec,lcc]", "runner=slurm", "runner.dry_run=true", "runner.gpus=2",
             "runner.partition=gpu", 'runner.options=["-c 12"]']  # fmt: skip
    with caplog.at_level("INFO"), pytest.raises(SystemExit) as done:
        run_bench(*TASKS, *words)
    assert done.value.code == 0
    commands = [text for text in caplog.messages if text.startswith("srun")]
    assert len(commands) == 2
    assert "srun -p gpu --gres=gpu:2 -c 12 -N1 -u -J" in commands[0]
    assert "LongBench_trec" in commands[0]
    assert "torch.distributed.run" in commands[0]
    assert not list(tmp_path.glob("outputs/*/*/*/*/metrics.json"))
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}


def test_a_worker_that_ends_early_is_a_failed_task_with_its_log(run_bench, monkeypatch):
    from experiments.benches.opencompass import cluster

    monkeypatch.setattr(cluster, "_make_runner", lambda _: lambda _configs: None)
    store = run_bench(*TASKS, "bench.tasks=[trec]", "runner=local")
    metrics = store.metrics()
    assert metrics["status"] == "failed"
    assert metrics["failures"]["trec"]["type"] == "WorkerError"
    assert "ended before sample 0" in metrics["failures"]["trec"]["message"]


def test_runners_are_no_part_of_a_runs_identity(compose_bench):
    from experiments.settings.config import RunConfig

    words = [*TASKS, "method=pbs"]
    here, there = (
        RunConfig.from_hydra(compose_bench(*words, runner))
        for runner in ("runner=process", "runner=local")
    )
    assert here.hash == there.hash


def test_dry_runs_and_tensor_parallel_need_the_right_runner(run_bench, monkeypatch):
    words = [*TASKS, "bench.tasks=[trec]", "runner=local", "runner.dry_run=true"]
    error = run_bench(*words).metrics()["error"]
    assert "needs runner=slurm" in error["message"]


def test_model_tp_needs_torchrun_and_the_other_way_round(monkeypatch):
    with pytest.raises(ConfigError, match="start them with: torchrun"):
        check_tensor_parallel(True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_tensor_parallel(True)
    with pytest.raises(ConfigError, match=r"add model\.tp=true"):
        check_tensor_parallel(False)


def test_a_single_process_keeps_its_numbers():
    assert mean_over_ranks([0.5, None]) == [0.5, None]


@pytest.mark.slow
def test_two_local_workers_give_what_one_process_gives(run_bench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*TASKS, "bench.tasks=[trec,lcc]", "method=pbs"]
    store = run_bench(*words, "runner=local", "runner.workers=2")
    assert store.metrics()["status"] == "finished"
    spread = store.samples()
    # Each worker says where it answered, and the run's env.json knows it.
    assert {record["environment"] for record in spread} <= set(store.environments())
    assert not list(store.folder.glob("workers/*"))
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}
    run_bench(*words, "resume=false")
    assert without_times(spread) == without_times(store.samples())


@pytest.mark.slow
def test_two_processes_with_one_model_give_what_one_gives(run_bench, tmp_path, project):
    words = [*TASKS, "bench.tasks=[trec,gov_report]", "method=pbs"]
    outputs = f"paths.outputs={tmp_path / 'outputs'}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node=2", str(project / "run.py")]  # fmt: skip
    done = subprocess.run(
        [*command, *QUIET, outputs, *words, "model.tp=true"],
        cwd=project,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("| trec |") == 1, "only the first process reports"
    (path,) = tmp_path.glob("outputs/longbench/tiny/pbs/*/samples.jsonl")
    sharded = [json.loads(line) for line in path.read_text().splitlines()]
    alone = run_bench(*words).samples()
    assert len(sharded) == len(alone) == 4
    for ours, theirs in zip(sharded, alone, strict=True):
        assert ours["completion"] == theirs["completion"]
        assert ours["density"] == pytest.approx(theirs["density"])
        assert ours["layer_density"] == pytest.approx(theirs["layer_density"])

"""One model over several processes: the tokens of one, densities and memory of all."""

import json
import os
import subprocess
import sys

import pytest
from transformers import AutoConfig

from experiments.benches.ttft import TtftBench
from experiments.models.load import load_model
from experiments.models.random_weights import ARCHITECTURES
from experiments.models.tensor_parallel import check_heads, timed_collectives
from experiments.settings.config import ConfigError, ModelConfig, RunConfig
from experiments.settings.ranks import (
    gather_over_ranks,
    is_shared,
    mean_over_ranks,
    num_ranks,
    rank,
)

SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WORDS = (
    "bench=ttft",
    "bench.lengths=[600,1200]",
    "bench.densities=[0.8,0.6]",
    "bench.seconds=0.01",
    "bench.min_rounds=2",
    "bench.max_rounds=2",
    "logger.mode=disabled",
)


@pytest.fixture
def architecture(tmp_path):
    """Folder of a small architecture with eight query heads over four key/value heads."""
    config = json.loads((ARCHITECTURES / "llama31_8b" / "config.json").read_text())
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, **SMALL}))
    return folder


@pytest.fixture
def start(architecture, tmp_path, project):
    """Run the bench in some processes; returns how it ended, and the folder of its one run."""

    def start(processes, *words):
        outputs = tmp_path / "outputs"
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        words = [*WORDS, *random_model(architecture), f"paths.outputs={outputs}", *words]
        done = subprocess.run(
            [sys.executable, *torchrun, str(project / "run.py"), *words, "model.tp=true"],
            cwd=project,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        (folder,) = outputs.glob("ttft/small_random/pbs/*")
        return done, folder

    return start


@pytest.fixture
def alone(architecture, compose_cell):
    """Samples of the same bench in this process alone."""
    from experiments.run.runner import run_cell

    def alone(*words):
        composed = compose_cell(*WORDS, *random_model(architecture), *words, fast=False)
        return samples_of(run_cell(composed))

    return alone


def random_model(architecture):
    return ("model=hf", f"model.path={architecture}", "model.weights=random")


def samples_of(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def compare(shared, alone, processes):
    """Numbers of several processes beside those of one."""
    assert len(shared) == len(alone) == 2
    for ours, theirs in zip(shared, alone, strict=True):
        assert ours["num_ranks"] == processes
        assert "num_ranks" not in theirs
        for kind in ("dense", "methods"):
            ((part,), (whole,)) = (one[kind].values() for one in (ours, theirs))
            assert part["first_token"] == whole["first_token"]
            assert len(part["peak_bytes_by_rank"]) == len(part["total_bytes_by_rank"]) == processes
            assert 0 < part["communication_share"] < 1
            assert len(part["communication_share_by_rank"]) == processes
            assert len(part["samples_ms"]) == 2
        assert part["density"] == pytest.approx(whole["density"])
        assert len(part["density_by_rank"]) == processes
        assert part["stages_ms"]["communication"] > 0


def test_two_processes_give_the_tokens_of_one(start, alone):
    done, folder = start(2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ttft on small_random") == 1, "only the first process reports"
    assert "communication" in done.stdout
    compare(samples_of(folder), alone(), 2)


@pytest.mark.slow
def test_four_processes_give_the_tokens_of_one_at_the_methods_own_density(start, alone):
    words = ("bench.densities=null", "method.block_size=32", "method.segment_size=64")
    done, folder = start(4, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    compare(samples_of(folder), alone(*words), 4)


@pytest.mark.slow
def test_three_processes_are_told_which_numbers_do(start):
    done, folder = start(3)
    assert done.returncode != 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["status"] == "failed"
    assert "3 processes do not divide them; start 2 or 4" in metrics["error"]["message"]
    assert "start 2 or 4" in done.stdout + done.stderr


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_numbers_that_divide_the_key_value_heads_are_right(processes):
    check_heads(AutoConfig.from_pretrained(ARCHITECTURES / "llama31_8b"), processes)


@pytest.mark.parametrize(
    ("heads", "processes", "advice"),
    [(8, 3, "start 2 or 4 or 8"), (8, 16, "start 2 or 4 or 8"), (1, 2, "leave out torchrun")],
)
def test_other_numbers_are_refused(heads, processes, advice):
    config = AutoConfig.from_pretrained(ARCHITECTURES / "llama31_8b")
    config.num_key_value_heads = heads
    with pytest.raises(ValueError, match=advice) as caught:
        check_heads(config, processes)
    assert f"the {heads} key/value heads" in str(caught.value)
    assert f"{processes} processes" in str(caught.value)


def test_the_refusal_is_all_that_is_said(monkeypatch, architecture):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"^model\.tp=true shares the 4 key/value heads"):
        load_model(ModelConfig(path=str(architecture), weights="random", tp=True))


def test_the_number_of_processes_is_part_of_a_runs_identity(compose_cell, monkeypatch):
    hashes = set()
    for processes in ("2", "4"):
        monkeypatch.setenv("WORLD_SIZE", processes)
        cfg = RunConfig.from_hydra(compose_cell("bench=ttft", "model.tp=true", fast=False))
        assert cfg.model.processes == int(processes)
        assert RunConfig.from_dict(cfg.to_dict()).hash == cfg.hash
        hashes.add(cfg.hash)
    assert len(hashes) == 2
    alone = RunConfig.from_hydra(compose_cell("bench=ttft", fast=False))
    assert alone.model.processes is None


def test_a_single_process_keeps_its_numbers():
    assert (rank(), num_ranks(), is_shared()) == (0, 1, False)
    assert gather_over_ranks("x") == ["x"]
    assert mean_over_ranks([0.5, None]) == [0.5, None]


def test_collectives_are_put_back():
    import torch.distributed as dist

    before = dist.all_reduce
    with timed_collectives():
        assert dist.all_reduce is not before
    assert dist.all_reduce is before


def test_every_process_makes_the_same_calls():
    """With model.tp the number of rounds must not follow a process's own clock."""
    bench = TtftBench(min_rounds=2, max_rounds=9)
    assert bench.rounds(is_shared=True) == (2, 2)
    assert bench.rounds(is_shared=False) == (2, 9)

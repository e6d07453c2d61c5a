"""``make bench`` and ``make bench-gpu``: ordinary runs, read back as one folder of results."""

import subprocess
import sys

import pytest

from experiments.store import RunStore
from experiments.timing.result_folders import main as write_csvs
from experiments.timing.result_folders import read_folder
from experiments.tools import bench
from experiments.tools.measure_crossover import crossovers


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke run, and what it printed."""
    out = tmp_path_factory.mktemp("bench") / "here"
    assert bench.main(["--on", "smoke", "--out", str(out), "--seconds", "500"]) == 0
    return out


def test_every_part_has_samples_enough_and_the_gate_takes_no_times(smoke):
    folder = read_folder(smoke)
    assert set(folder.parts) == {"gate", "table7", "selection", "ttft"}
    for part in ("table7", "selection", "ttft"):
        assert sorted(record["length"] for record in folder.parts[part]) == [512, 1024]
        for record in folder.parts[part]:
            for entry in (*record["dense"].values(), *record["methods"].values()):
                assert entry["num_samples"] >= 10
                assert entry["num_wall_samples"] == entry["num_samples"]
                assert len(entry["dropped_ms"]) >= 2
    for record in folder.parts["gate"]:
        assert not [key for key in record["methods"] if "median_ms" in record["methods"][key]]
    assert folder.methods["pbs shared"] == {"method": "pbs", "params": {"gqa": "shared"}}
    assert set(folder.parts["table7"][0]["methods"]) == {"pbs", "pbs shared"}
    assert bench.fewest_rounds("table7", 524288) == bench.fewest_rounds("ttft", 131072) == 5
    assert bench.fewest_rounds("table7", 65536) == bench.fewest_rounds("ttft", 32768) == 10


def test_the_same_command_has_nothing_left_to_do(smoke, capsys):
    before = {path: path.stat().st_mtime_ns for path in smoke.glob("*/*/*/*/samples.jsonl")}
    assert bench.main(["--on", "smoke", "--out", str(smoke), "--seconds", "500"]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    printed = capsys.readouterr().out
    assert "worst error / allowed 0." in printed
    assert "| 1024 | 4/2/32 | pbs shared |" in printed


def test_results_of_another_environment_do_not_mix(smoke, capsys, monkeypatch):
    monkeypatch.setenv("PBS_COMMIT", "another")
    command = ["--on", "smoke", "--out", str(smoke), "--parts", "table7", "--lengths", "512"]
    assert bench.main(command) == 2
    assert "was measured in another environment: commit differ" in capsys.readouterr().out


def test_csvs_of_run_folders_follow_from_their_samples(smoke):
    write_csvs([str(smoke)])
    names = sorted(path.name for path in smoke.glob("*.csv"))
    assert names == ["break_even.csv", "gate.csv", "selection.csv", "table7.csv", "ttft.csv"]


def test_a_crossover_comes_from_run_folders(smoke):
    found = {row.method: row for row in crossovers(read_folder(smoke))}
    assert "pbs gqa=shared" in found
    assert found["pbs gqa=shared"].num_samples >= 10


def test_without_time_runs_are_skipped_and_said_so(tmp_path, capsys):
    arguments = ["--on", "smoke", "--out", str(tmp_path), "--parts", "table7"]
    assert bench.main([*arguments, "--seconds", "0.001"]) == 0
    assert "table7: no time for: python run.py method=pbs" in capsys.readouterr().out
    assert not [*tmp_path.rglob("samples.jsonl")]


def test_a_wrong_output_is_an_exit_status(tmp_path, monkeypatch, capsys):
    from experiments.timing import dense_kernels

    real = dense_kernels.dense_kernels

    def wrong(device, names=None):
        return {"cpu": lambda *args, **kw: real(device)["cpu"](*args, **kw) * 1.01}

    monkeypatch.setattr(dense_kernels, "dense_kernels", wrong)
    arguments = ["--on", "smoke", "--out", str(tmp_path), "--parts", "table7", "--lengths", "512"]
    assert bench.main(arguments) == 1
    assert "WRONG table7" in capsys.readouterr().out


def test_a_gpu_machine_needs_neither_wandb_nor_matplotlib(tmp_path, project):
    arguments = ["--on", "smoke", "--out", str(tmp_path), "--parts", "gate,table7"]
    code = (
        "import sys\n"
        "for name in ('wandb', 'matplotlib'): sys.modules[name] = None\n"
        "from experiments.tools import bench\n"
        f"sys.exit(bench.main([*{arguments}, '--lengths', '512']))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=project, check=True, capture_output=True, text=True
    )
    assert "no picture of this run" in found.stderr + found.stdout
    assert "| 512 | 4/2/32 | pbs shared |" in found.stdout


def test_unknown_parts_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--on", "smoke", "--out", str(tmp_path), "--parts", "table8"])
    assert "valid: gate, table7, selection, ttft" in capsys.readouterr().err


def test_all_methods_of_the_registry_are_measured():
    methods = bench.own_methods()
    assert [*methods][:2] == ["pbs", "pbs shared"]
    assert {"pbs_plus", "random_blocks", "xattention", "streaming"} <= {*methods}
    (selection,) = bench.jobs(bench.SIZES["gpu"], "selection", "cuda", [8192])
    assert "random_blocks: {name: random_blocks}" in " ".join(selection.words)


@pytest.mark.parametrize("part", ["gate", "table7", "selection", "ttft"])
def test_every_job_of_a_gpu_composes(part, compose_cell):
    for job in bench.jobs(bench.SIZES["gpu"], part, "cuda", None):
        assert compose_cell(*job.words, fast=False).bench.name in ("gate", "attention", "ttft")


@pytest.mark.slow
def test_sparse_attention_on_a_cpu_is_twice_as_fast_as_sdpa(tmp_path):
    (job,) = bench.jobs(bench.SIZES["cpu"], "table7", "cpu", [bench.TARGET_LENGTH])
    folder = bench.run_job(job, tmp_path, resumes=True)
    for line in bench.target_lines(folder):
        print(line)
    entry = RunStore(folder).samples()[0]["methods"]["pbs"]
    assert entry["density"] <= bench.TARGET_DENSITY
    assert entry["speed_up"]["cpu"] >= bench.TARGET_SPEED_UP

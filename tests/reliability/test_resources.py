"""Memory, disk, permissions and devices that give out: one cell fails, the others go on."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments import store
from experiments.benches import needle
from experiments.files import write_atomically
from experiments.report import run_pictures
from experiments.results import load
from experiments.run import runner
from experiments.settings import console, environment, failures
from experiments.settings.failures import describe_failure, explain_failure
from experiments.store import RunStore
from tests.experiments.conftest import FAST, without_times

SWEEP = ("-m", *FAST, "paths.outputs=out", "method=flash,pbs,meanpool")


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def metrics_of(folder):
    """Metrics of all runs, by method."""
    runs = (path.parent for path in folder.rglob("metrics.json"))
    return {run.parent.name: RunStore(run).metrics() for run in runs}


def failures_in(printed):
    """Lines about cells that left no record."""
    return [line for line in printed.splitlines() if line.startswith("failed: ")]


@pytest.fixture
def failing(monkeypatch):
    """Let one method's answers end in an error, from its second sample on."""

    def failing(error, method="pbs"):
        answer, count = needle.answer, []

        def fail(model, *args):
            from pbs.patch.huggingface import get_patch

            name = type(get_patch(model.model).method).__name__.lower()
            count.append(name)
            if name == method and count.count(name) > 1:
                raise error
            return answer(model, *args)

        monkeypatch.setattr(needle, "answer", fail)

    return failing


@pytest.mark.parametrize(
    ("error", "kind", "advice"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
            "OutOfMemoryError",
            "out of memory: try shorter prompts (bench.lengths",
        ),
        (
            RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be"),
            "RuntimeError",
            "the device failed, and this process cannot use it again",
        ),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "samples.jsonl"),
            "OSError",
            "No space left on device: samples.jsonl; the disk is full",
        ),
    ],
    ids=["memory", "lost device", "full disk"],
)
def test_a_cell_that_runs_out_fails_and_the_others_go_on(
    command, failing, tmp_path, monkeypatch, error, kind, advice
):
    def gone(**_):
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(failures, "release_memory", gone)  # a lost device cannot give any back
    with monkeypatch.context():
        failing(error)
        status, printed = command(*SWEEP)
    assert status == 1
    assert "Traceback" not in printed
    metrics = metrics_of(tmp_path / "out")
    assert {name: entry["status"] for name, entry in metrics.items()} == {
        "flash": "finished",
        "pbs": "failed",
        "meanpool": "finished",
    }
    recorded = metrics["pbs"]["error"]
    assert recorded["type"] == kind
    assert advice in recorded["message"].split("\n")[0]
    assert advice in printed
    assert "raise error" in recorded["traceback"]
    frame = load(str(tmp_path / "out"))
    assert set(frame["method"]) == {"flash", "meanpool"}


def test_the_same_command_continues_after_memory_came_back(command, failing, tmp_path, monkeypatch):
    words = (*FAST, "paths.outputs=out", "method=pbs")
    with monkeypatch.context() as patch:
        patch.setattr(needle, "answer", needle.answer)
        failing(MemoryError())
        status, _ = command(*words)
    (folder,) = (tmp_path / "out/needle/tiny/pbs").iterdir()
    kept = RunStore(folder).samples()
    assert (status, len(kept)) == (1, 1)
    monkeypatch.undo()
    status, printed = command(*words)
    assert status == 0
    assert "failed earlier, trying again" in printed
    assert "1 of 2 samples done" in printed
    resumed = RunStore(folder).samples()
    assert resumed[0] == kept[0]
    command(*words, "resume=false")
    assert without_times(resumed) == without_times(RunStore(folder).samples())


def test_nothing_can_be_written_at_all(command, tmp_path, monkeypatch):
    monkeypatch.setattr(store.os, "fsync", full)
    status, printed = command(*SWEEP)
    assert status == 1
    assert "Traceback" not in printed
    reason = "cannot write the results: No space left on device; the disk is full"
    assert [reason in line for line in failures_in(printed)] == [True] * 3
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [path for path in written if path.name.startswith(".metrics")]
    assert not list((tmp_path / "out").rglob("metrics.json"))


def test_samples_survive_a_disk_that_fills_up_before_the_metrics(command, tmp_path, monkeypatch):
    words = (*FAST, "paths.outputs=out", "method=pbs")
    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "write_metrics", full)
        status, printed = command(*words)
    assert status == 1
    assert "cannot write the results: No space left on device" in printed
    (folder,) = (tmp_path / "out/needle/tiny/pbs").iterdir()
    kept = RunStore(folder).samples()
    assert len(kept) == 2
    monkeypatch.undo()
    status, _ = command(*words)
    assert status == 0
    assert RunStore(folder).samples() == kept


def test_a_log_that_cannot_be_written_costs_one_message(run, monkeypatch, capsys):
    def emit(handler, record):
        try:
            full()
        except OSError:
            handler.handleError(record)

    monkeypatch.setattr(console._LogFile, "emit", emit)
    metrics = run("method=flash").metrics()
    assert metrics["status"] == "finished"
    printed = capsys.readouterr().err
    assert printed.count("the log ends here: [Errno 28] No space left on device") == 1
    assert "Logging error" not in printed


def test_the_table_is_shown_where_it_cannot_be_written(command, monkeypatch):
    from experiments.run import summary

    monkeypatch.setattr(summary, "write", full)
    status, printed = command(*FAST, "paths.outputs=out", "method=flash")
    assert status == 1
    assert "reference" in printed
    assert "No space left on device; the disk is full" in printed
    assert "Traceback" not in printed


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    write_atomically(path, "old")
    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_outputs_that_may_not_be_written(command, monkeypatch, number):
    make = Path.mkdir

    def refuse(path, *args, **kwargs):
        if "needle" in path.parts:
            raise OSError(number, os.strerror(number), str(path))
        make(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    status, printed = command(*SWEEP)
    assert status == 1
    assert [os.strerror(number) in line for line in failures_in(printed)] == [True] * 3
    assert "write elsewhere with paths.outputs=DIR" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("folder", ["file/out", "/proc/nothing/out", "/dev/null"])
def test_outputs_that_are_no_folder(command, tmp_path, folder):
    (tmp_path / "file").write_text("")
    for words in ((), ("-m",)):
        status, printed = command(*FAST, f"paths.outputs={folder}", "method=flash", *words)
        assert status == 1
        assert folder.split("/")[-2] in printed
        assert "results go to the folder paths.outputs=DIR" in printed
        assert "Traceback" not in printed


def test_a_missing_gpu_fails_its_cell_only(command, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, printed = command(*FAST, "paths.outputs=out", "method=flash", "-m",
                              "model.device=cuda,cuda:3,cpu")  # fmt: skip
    assert status == 1
    found = [RunStore(path.parent).metrics() for path in tmp_path.rglob("metrics.json")]
    assert sorted(metrics["status"] for metrics in found) == ["failed", "failed", "finished"]
    messages = [metrics["error"]["message"] for metrics in found if "error" in metrics]
    assert all("but torch sees no GPU; try cpu" in message for message in messages)
    assert "Traceback" not in printed


def test_a_gpu_that_is_not_there(monkeypatch):
    from experiments.models.load import load_model
    from experiments.settings.config import ConfigError, ModelConfig

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="there are 2 GPUs: the last is cuda:1"):
        load_model(ModelConfig(path="experiments/tiny", device="cuda:2"))


def test_a_gpu_that_does_not_answer_is_described(monkeypatch):
    def gone(*_):
        raise RuntimeError("CUDA error: unspecified launch failure\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", gone)
    text = environment.device_name()
    assert text == "a GPU that does not answer (CUDA error: unspecified launch failure)"


def test_a_failed_picture_for_want_of_memory_loses_no_result(compose_cell, monkeypatch):
    def explode(*_):
        raise MemoryError

    monkeypatch.setitem(run_pictures.OF_A_RUN, "needle", explode)
    metrics = RunStore(runner.run_cell(compose_cell("method=flash"))).metrics()
    assert metrics["status"] == "finished"


def test_failures_say_what_to_do_and_nothing_that_is_not_so():
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9")):
        assert "out of memory: try shorter prompts" in explain_failure(error)
    assert explain_failure(ValueError("no such task")) == "no such task"
    assert explain_failure(KeyError()) == "KeyError"
    text = explain_failure(OSError(errno.ENOENT, "No such file or directory", "x"))
    assert text == "No such file or directory: x"
    assert "check its permissions" in explain_failure(PermissionError(errno.EACCES, "no", "x"))
    assert describe_failure(ValueError("x"))["type"] == "ValueError"


def test_a_real_limit_on_the_size_of_files(project, tmp_path):
    """As a full disk, from outside: the kernel ends every file at 2500 bytes."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))

    words = ["debug=fast", "check=false", "method=flash", "bench.depths=[0.0,0.5,1.0]"]
    done = subprocess.run(
        [sys.executable, str(project / "run.py"), *words, "paths.outputs=out"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        preexec_fn=limit,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr
    assert "the disk is full: free some space" in done.stderr
    (folder,) = (tmp_path / "out/needle/tiny/flash").iterdir()
    kept = RunStore(folder).samples()
    assert 0 < len(kept) < 6
    metrics = RunStore(folder).metrics()
    assert metrics["status"] == "failed"
    assert metrics["error"]["message"].startswith("File too large; the disk is full")

"""Whole runs on the embedded model: results, resume, failures, pairing, the command line."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from experiments import results
from experiments.benches.opencompass import harness
from experiments.report.compare import find_dense
from experiments.report.page import write_markdown
from experiments.report.runs import read_results
from experiments.report.scores import format_scores, tabulate_scores
from experiments.report.sections import make_sections
from experiments.report.table import format_columns, make_rows
from experiments.store import RunStore
from experiments.tools.leaderboard import make_leaderboard
from tests.experiments.benches.opencompass.conftest import LONGBENCH, LONGBENCH_V2, QUIET
from tests.experiments.conftest import without_times


def test_a_run_leaves_records_scores_and_averages(run_longbench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = run_longbench("method=pbs")
    metrics = store.metrics()
    assert (metrics["status"], metrics["partial"], metrics["failures"]) == ("finished", True, {})
    records = store.samples()
    assert [record["sample_id"] for record in records] == [
        *("trec/0", "trec/1", "passage_retrieval_zh/0", "passage_retrieval_zh/1")
    ]
    assert all(0 < record["density"] <= 1 for record in records)
    assert {record["category"] for record in records} == {"few-shot learning", "synthetic"}
    total = metrics["results"]["total"]
    assert total["score"] == total["task_average"]
    assert set(total["by_category"]) == {"few-shot learning", "synthetic"}
    # OpenCompass writes into the run's folder and nowhere else.
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}
    theirs = json.loads(next(store.folder.glob("opencompass/results/*/*trec.json")).read_text())
    assert theirs["score"] == metrics["results"]["cells"][0]["score"]
    frame = results.load(tmp_path / "outputs")
    assert list(frame["task"]) == ["trec", "passage_retrieval_zh"]
    assert {"score", "density", "num_truncated", "prefill_seconds"} <= set(frame.columns)


def test_the_same_command_again_measures_what_is_missing(run_longbench, monkeypatch):
    store = run_longbench("method=flash")
    whole, before = store.samples(), store.metrics()
    lines = store.samples_path.read_text().splitlines(keepends=True)
    store.samples_path.write_text("".join(lines[:3]) + lines[3][:40])
    store.metrics_path.unlink()
    answered = []
    from experiments.benches.opencompass.model import PatchedModel

    real = PatchedModel.answer_sample

    def record(self, index, *args):
        answered.append(index)
        return real(self, index, *args)

    monkeypatch.setattr(PatchedModel, "answer_sample", record)
    run_longbench("method=flash")
    assert answered == [1]
    assert without_times(store.samples()) == without_times(whole)
    after = store.metrics()["results"]
    assert after["total"]["score"] == before["results"]["total"]["score"]


def test_another_parameter_is_another_run(run_longbench):
    folders = {
        run_longbench("method=pbs", tasks="trec").folder,
        run_longbench("method=pbs", "method.threshold=0.5", tasks="trec").folder,
        run_longbench("method=pbs", "bench.max_out_len=5", tasks="trec").folder,
    }
    assert len(folders) == 3
    names = {next((folder / "opencompass" / "results").iterdir()).name for folder in folders}
    assert names == {f"pbs-{folder.name}" for folder in folders}


def test_a_failing_task_is_recorded_and_the_others_go_on(run_longbench, monkeypatch, tmp_path):
    real = harness.EvaluatedTask.evaluate

    def explode(self):
        if "trec" in str(self._path("results")):
            raise OSError("metric broke")
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(harness.EvaluatedTask, "evaluate", explode)
        store = run_longbench("method=flash")
    metrics = store.metrics()
    assert metrics["status"] == "failed"
    assert "trec (OSError: metric broke)" in metrics["error"]["message"]
    assert "explode" in metrics["failures"]["trec"]["traceback"]
    assert [cell["score"] for cell in metrics["results"]["cells"]] == [None, 0.0]
    table = format_scores(tabulate_scores([store.folder]))
    assert "| trec | failed |" in table
    assert "| passage_retrieval_zh | 0.00 |" in table
    run_longbench("method=flash")
    assert store.metrics()["status"] == "finished"


def test_changed_data_do_not_mix_with_earlier_answers(run_bench, tmp_path, caplog):
    source = LONGBENCH / "data" / "hotpotqa.jsonl"
    copy = tmp_path / "data" / "hotpotqa.jsonl"
    copy.parent.mkdir()
    copy.write_text(source.read_text())
    words = ["bench=longbench", f"bench.data_dir={tmp_path}", "bench.tasks=[hotpotqa]",
             "bench.limit=1", "bench.max_out_len=2", "method=flash"]  # fmt: skip
    store = run_bench(*words)
    store.metrics_path.unlink()
    copy.write_text(source.read_text().replace("emblem", "flag"))
    again = run_bench(*words)
    assert again.metrics()["status"] == "finished"
    assert again.folder != store.folder
    assert "bench.data_dir/data/hotpotqa.jsonl changed since" in caplog.text


def test_an_earlier_answer_to_another_prompt_is_refused(run_longbench):
    """Of files that have no digest in the settings, such as the hub's."""
    store = run_longbench("method=flash")
    records = store.samples()
    records[0]["prompt"] = "0123456789abcdef"
    store.samples_path.write_text("".join(json.dumps(record) + "\n" for record in records))
    store.metrics_path.unlink()
    metrics = run_longbench("method=flash").metrics()
    assert "was answered for another prompt" in metrics["error"]["message"]
    assert run_longbench("method=flash", "resume=false").metrics()["status"] == "finished"


def test_samples_of_an_edited_file_are_not_paired(run_bench, tmp_path):
    lines = (LONGBENCH / "data" / "trec.jsonl").read_text().splitlines(keepends=True)
    copy = tmp_path / "data" / "trec.jsonl"
    copy.parent.mkdir()
    copy.write_text("".join(lines))
    words = ["bench=longbench", f"bench.data_dir={tmp_path}", "bench.tasks=[trec]",
             "bench.limit=2", "bench.max_out_len=2"]  # fmt: skip
    dense = run_bench(*words, "method=flash")
    row = json.loads(lines[1])
    row["context"] = f"Something else. {row['context']}"
    copy.write_text(lines[0] + json.dumps(row) + "\n" + "".join(lines[2:]))
    sparse = run_bench(*words, "method=pbs")
    paired = sparse.metrics()["against_dense"]
    assert (paired["hash"], paired["num_pairs"]) == (dense.folder.name, 1)
    assert (paired["num_differing"], paired["differing"]) == (1, ["trec/1"])
    # Another right answer to the same prompt is another sample, too.
    row = json.loads(lines[0])
    row["answers"] = ["something else"]
    copy.write_text(json.dumps(row) + "\n" + "".join(lines[1:]))
    paired = run_bench(*words, "method=pbs").metrics()["against_dense"]
    assert (paired["num_pairs"], paired["differing"]) == (1, ["trec/0"])


def test_a_part_of_the_tasks_pairs_with_a_dense_run_of_all(run_longbench):
    dense = run_longbench("method=flash")
    part = run_longbench("method=pbs", tasks="trec")
    paired = part.metrics()["against_dense"]
    assert (paired["hash"], paired["num_pairs"], paired["num_unpaired"]) == (
        dense.folder.name, 2, 0,
    )  # fmt: skip
    # Longer answers are other samples, whatever the prompt.
    assert run_longbench("method=pbs", "bench.max_out_len=5").metrics()["against_dense"] is None


def test_a_run_is_paired_with_dense_and_names_the_samples_that_moved(run_longbench, monkeypatch):
    dense = run_longbench("method=flash")
    dense_metrics, records = dense.metrics(), dense.samples()
    records[0]["score"], records[3]["score"] = 50.0, 100.0
    dense.samples_path.write_text("".join(json.dumps(record) + "\n" for record in records))
    dense.write_metrics({**dense_metrics, "samples_digest": dense.samples_digest()})
    store = run_longbench("method=pbs")
    paired = store.metrics()["against_dense"]
    assert paired["hash"] == dense.folder.name
    assert (paired["num_pairs"], paired["num_unpaired"]) == (4, 0)
    assert paired["lost"] == ["passage_retrieval_zh/1", "trec/0"]
    assert paired["gained"] == []
    assert paired["difference"] == pytest.approx(-(25 + 50) / 2 / 100)
    assert (paired["num_better"], paired["num_worse"]) == (0, 2)


def test_one_sample_is_paired_and_its_table_claims_nothing(run_bench):
    words = ["bench=longbench", f"bench.data_dir={LONGBENCH}", "bench.tasks=[trec]",
             "bench.limit=1", "bench.max_out_len=2"]  # fmt: skip
    dense = run_bench(*words, "method=flash")
    dense_metrics, record = dense.metrics(), dense.samples()[0] | {"score": 100.0}
    dense.samples_path.write_text(json.dumps(record) + "\n")
    dense.write_metrics({**dense_metrics, "samples_digest": dense.samples_digest()})
    store = run_bench(*words, "method=pbs")
    paired = store.metrics()["against_dense"]
    assert (paired["num_pairs"], paired["low"], paired["high"]) == (1, -1, 1)
    columns = format_columns(make_rows([store.folder]))
    assert columns["difference to dense, points"][-1] == "-100.0 [-100.0, +100.0]"
    (times,) = (texts for name, texts in columns.items() if name.startswith("prefill"))
    assert all(text.endswith(" (n = 1)") for text in times)


def test_longbench_v2_by_difficulty_and_length(run_bench):
    words = ["bench=longbench_v2", f"bench.data_dir={LONGBENCH_V2}", "bench.max_out_len=2"]
    dense = run_bench(*words, "method=flash")
    metrics = dense.metrics()
    assert metrics["partial"] is False
    assert metrics["results"]["total"]["num_samples"] == 6
    assert metrics["results"]["total"]["accuracy"] == metrics["results"]["total"]["score"] / 100
    assert list(metrics["results"]["by_difficulty"]) == ["easy", "hard"]
    assert list(metrics["results"]["by_length_class"]) == ["short", "medium", "long"]
    assert sum(cell["num_samples"] for cell in metrics["results"]["cells"]) == 6
    paired = run_bench(*words, "method=pbs").metrics()["against_dense"]
    assert (paired["hash"], paired["num_pairs"]) == (dense.folder.name, 6)


def test_ruler_generates_its_samples(run_bench):
    words = ["bench=ruler", "bench.tasks=[vt,fwe]", "bench.lengths=[1024,2048]",
             "bench.num_samples=1", "bench.max_out_len=2", "method=pbs"]  # fmt: skip
    metrics = run_bench(*words).metrics()
    assert metrics["status"] == "finished"
    assert metrics["partial"] is True
    assert list(metrics["results"]["by_length"]) == ["1024", "2048"]
    cells = [(cell["task"], cell["length"]) for cell in metrics["results"]["cells"]]
    assert cells == [("vt", 1024), ("fwe", 1024), ("vt", 2048), ("fwe", 2048)]


def test_ruler_refuses_lengths_the_model_does_not_take(run_bench):
    words = ["bench=ruler", "bench.tasks=[vt]", "bench.lengths=[4096]", "model.max_length=2048"]
    error = run_bench(*words).metrics()["error"]
    assert "bench.lengths has 4096, but model.max_length=2048" in error["message"]


def command_of(tmp_path, *words):
    return [*QUIET, f"paths.outputs={tmp_path / 'outputs'}", *words]


def test_a_killed_process_loses_no_sample_and_doubles_none(run_bench, tmp_path, project):
    words = ["bench=longbench", f"bench.data_dir={LONGBENCH}", "bench.tasks=[gov_report,qmsum]",
             "bench.max_out_len=150", "method=pbs"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, str(project / "run.py"), *command_of(tmp_path, *words)],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 180
    samples = []
    while time.monotonic() < deadline and process.poll() is None:
        samples = list(tmp_path.glob("outputs/longbench/tiny/pbs/*/samples.jsonl"))
        if samples and samples[0].read_bytes().count(b"\n") >= 1:
            break
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    killed = samples[0].read_bytes()
    assert not (samples[0].parent / "metrics.json").exists(), "killed too late to test anything"
    store = run_bench(*words)
    assert store.samples_path == samples[0]
    assert store.samples_path.read_bytes().startswith(killed[: killed.rfind(b"\n") + 1])
    resumed = store.samples()
    assert len(store.samples_path.read_text().splitlines()) == len(resumed) == 6
    run_bench(*words, "resume=false")
    assert without_times(resumed) == without_times(store.samples())


def test_the_command_prints_scores_and_marks_what_was_not_run(command, tmp_path):
    words = ["bench=longbench", f"bench.data_dir={LONGBENCH}", "bench.tasks=[trec]",
             "bench.limit=1", "bench.max_out_len=2", "method=flash", "model.path=experiments/tiny",
             "model.name=llama31_8b"]  # fmt: skip
    status, printed = command(*command_of(tmp_path, *words))
    assert status == 0
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert "trec 0.00" in lines
    assert "paired, Student with two added pairs" in printed
    assert "flash average 0.00 38.28 -38.28 partial" in lines
    assert "pbs average – 37.37 – not run" in lines
    assert "| trec" not in printed
    group = tmp_path / "outputs" / "longbench" / "llama31_8b"
    assert (group / "published.csv").is_file()
    assert (group / "scores.md").read_text().startswith("| task | flash (partial) |")


def test_a_failed_task_makes_the_command_fail(command, tmp_path, monkeypatch):
    monkeypatch.setattr(harness.EvaluatedTask, "infer", lambda *_: 1 / 0)
    words = ["bench=longbench", f"bench.data_dir={LONGBENCH}", "bench.tasks=[trec]",
             "bench.limit=1", "method=flash"]  # fmt: skip
    status, printed = command(*command_of(tmp_path, *words))
    assert status == 1
    assert printed.count("ZeroDivisionError") == 1
    assert "failed: flash, see " in printed


def test_help_and_import_do_not_load_opencompass(project):
    code = "import sys, run; from experiments.run.cli import register_configs; register_configs(); "
    code += "print('opencompass' in sys.modules, 'datasets' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]


def test_all_benches_compose_with_every_model(compose_bench):
    from experiments.settings.config import RunConfig

    for bench in ("longbench", "longbench_v2", "ruler"):
        for model in ("llama31_8b", "qwen25_7b_1m", "qwen25_14b_1m", "qwen3_8b", "tiny"):
            cfg = RunConfig.from_hydra(compose_bench(f"bench={bench}", f"model={model}"))
            assert (cfg.bench["name"], cfg.model_name) == (bench, model)
    cfg = RunConfig.from_hydra(compose_bench("bench=longbench"))
    assert len(cfg.bench["tasks"]) == 21
    assert cfg.bench["max_seq_len"] == 131072
    assert find_dense(cfg) is None
    assert isinstance(RunStore(cfg.folder).metrics(), dict)


def test_truncated_prompts_are_said_wherever_results_stand(command, tmp_path, caplog):
    words = ["bench=longbench", f"bench.data_dir={LONGBENCH}", "bench.tasks=[trec,gov_report]",
             "bench.limit=2", "bench.max_out_len=2", "bench.max_seq_len=150", "method=flash",
             "model.path=experiments/tiny", "model.name=llama31_8b"]  # fmt: skip
    status, printed = command(*command_of(tmp_path, *words))
    assert status == 0
    group = tmp_path / "outputs" / "longbench" / "llama31_8b"
    (folder,) = group.glob("flash/*")
    cut = [cell["num_truncated"] for cell in RunStore(folder).metrics()["results"]["cells"]]
    assert sum(cut) > 0
    named = [f"{task}: {n} of 2" for task, n in zip(("trec", "gov_report"), cut, strict=True) if n]
    note = f"truncated: {sum(cut)} of 4 prompts ({', '.join(named)}), of whose text a part"
    assert note in caplog.text  # the warning at the end of the run
    assert " ".join(printed.split()).count(note) >= 2  # and under the table
    assert note in (folder / "run.log").read_text()
    for name in ("summary.md", "scores.md"):
        assert note in (group / name).read_text(), name
    assert f"partial; {sum(cut)} of 4 prompts truncated" in (group / "published.md").read_text()
    results_ = read_results(tmp_path / "outputs")
    write_markdown(make_sections(results_), tmp_path / "report.md")
    assert note[1:] in (tmp_path / "report.md").read_text()
    assert make_leaderboard(results_)[0]["num_truncated"].tolist() == [sum(cut)]
    assert results.load(tmp_path / "outputs")["num_truncated"].tolist() == cut

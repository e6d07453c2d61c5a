"""Data: found where the user says, and missing data explained before a model is loaded."""

import json
import zipfile

import pytest

from experiments.benches.opencompass import files, longbench
from experiments.benches.opencompass.files import (
    MissingDataError,
    fetch,
    find_folder,
    read_rows,
    require,
)
from experiments.run import runner
from experiments.settings.config import ConfigError
from tests.experiments.benches.opencompass.conftest import LONGBENCH


def test_rows_are_read_from_lines_lists_and_archives(tmp_path):
    rows = [{"a": 1, "b": "x\u2028y"}, {"a": 2, "b": ""}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    (tmp_path / "lines.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "list.json").write_text(json.dumps(rows))
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("data/lines.jsonl", lines)
    assert read_rows(tmp_path / "lines.jsonl", ["a", "b"]) == rows
    assert read_rows(tmp_path / "list.json", ["a"]) == [{"a": 1}, {"a": 2}]
    assert read_rows(tmp_path / "all.zip", ["a", "b"], "data/lines.jsonl") == rows
    with pytest.raises(MissingDataError, match=r"has no data/other\.jsonl"):
        read_rows(tmp_path / "all.zip", ["a"], "data/other.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}\n{"a": ', "line 2: no JSON"),
        ('{"b": 1}\n', "row 0: expected the columns a, missing a"),
        ("", "has no rows"),
    ],
)
def test_broken_files_are_explained(tmp_path, content, message):
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / "data.jsonl", ["a"])


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(MissingDataError, match="nowhere: no such folder"):
        find_folder("nowhere")
    with pytest.raises(MissingDataError, match=r"missing:\n.*/x\.json\nGet it"):
        require([tmp_path / "x.json"], advice="Get it")


def test_a_folder_may_be_relative_to_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_folder("tests/data/longbench") == LONGBENCH


def test_an_unreachable_hub_is_explained(monkeypatch):
    import huggingface_hub

    def refuse(*_, **__):
        raise OSError("offline\nand a long story")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(MissingDataError, match=r"could not fetch data\.zip .*: offline\nDo this"):
        fetch("a/b", "data.zip", advice="Do this")


def test_missing_data_ends_the_run_before_a_model_is_loaded(run_bench, tmp_path, monkeypatch):
    def load(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(runner, "load_model", load)
    for bench, file in (("longbench", "data/hotpotqa.jsonl"), ("longbench_v2", "data.json")):
        metrics = run_bench(f"bench={bench}", f"bench.data_dir={tmp_path}").metrics()
        assert metrics["status"] == "failed"
        assert metrics["error"]["type"] == "MissingDataError"
        assert str(tmp_path / file) in metrics["error"]["message"]
        assert "https://huggingface.co/datasets/THUDM" in metrics["error"]["message"]
    metrics = run_bench("bench=ruler", "bench.lengths=[4096]").metrics()
    assert "PaulGrahamEssays.jsonl" in metrics["error"]["message"]
    assert "bench.tasks=[niah_single_1," in metrics["error"]["message"]


def test_longbench_reads_the_archive_of_the_hub(tmp_path, monkeypatch, compose_bench):
    from experiments.settings.config import RunConfig

    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((LONGBENCH / "data").glob("*.jsonl")):
            file.write(path, f"data/{path.name}")
    monkeypatch.setattr(longbench, "fetch", lambda *_, **__: archive)
    cfg = RunConfig.from_hydra(compose_bench("bench=longbench"))
    for settings in ({}, {"data_dir": str(tmp_path)}):
        bench = longbench.LongBench(**settings)
        bench.prepare(cfg)
        assert {bench.num_rows(part) for part in bench.parts()} == {3}


def test_opencompass_missing_is_explained(monkeypatch, compose_bench):
    from experiments.benches.opencompass import base
    from experiments.settings.config import RunConfig

    monkeypatch.setattr(base, "find_spec", lambda _: None)
    cfg = RunConfig.from_hydra(compose_bench("bench=longbench"))
    with pytest.raises(ConfigError, match="needs OpenCompass; install it"):
        longbench.LongBench().prepare(cfg)


def test_files_stay_in_memory_for_one_call_after_another(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"a": 1}\n')
    first = read_rows(path, ["a"])
    assert read_rows(path, ["a"]) is first
    assert files._read_rows.cache_info().maxsize == 1

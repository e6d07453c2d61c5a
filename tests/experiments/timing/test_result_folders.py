"""Results of any device: found by what is in a folder, merged, and free of cold samples."""

import json

import pytest

from experiments.report.times import break_even_table, committed_times, timing_table
from experiments.timing import result_folders
from experiments.timing.result_folders import (
    COMMITTED,
    main,
    newest_folders,
    read_folder,
    write_tables,
)
from experiments.timing.result_folders import (
    result_folders as all_folders,
)


def cell(length, ours, dense, *, density=0.5, **more):
    entry = {"density": density, "dense_reason": "", "median_ms": ours[0], "samples_ms": ours}
    return {
        "length": length,
        "q_heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "dtype": "bfloat16",
        "target_density": density,
        "dense": {"flash": {"median_ms": dense[0], "samples_ms": dense}},
        "methods": {"pbs": entry, "pbs shared": dict(entry)},
        **more,
    }


def fill(folder, device, time, *records, name="results.json", part="table7", commit="abc"):
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"device": device, "time": time, "commit": commit, "packages": {}}
    text = json.dumps({"environment": environment, "parts": {part: list(records)}})
    (folder / name).write_text(text)
    return folder


def test_results_of_any_device_are_found_by_what_they_say(tmp_path, monkeypatch):
    fill(tmp_path / "b200", "B200", "2027-01-01", cell(8192, [1.0] * 5, [2.0] * 5))
    fill(tmp_path / "h100_zzz", "H100", "2026-01-01", cell(8192, [3.0] * 5, [3.0] * 5))
    fill(tmp_path / "a_newer_h100", "H100", "2026-02-02", cell(8192, [2.0] * 5, [3.0] * 5))
    fill(tmp_path / "no_table7", "A100", "2026-02-02", cell(8192, [2.0], [3.0]), part="ttft")
    (tmp_path / "needle").mkdir()
    names = [folder.path.name for folder in newest_folders(tmp_path, part="table7")]
    assert names == ["b200", "a_newer_h100"]
    assert [one.device for one in newest_folders(tmp_path)] == ["A100", "B200", "H100"]
    monkeypatch.setattr(result_folders, "COMMITTED", tmp_path)
    monkeypatch.setattr("experiments.report.times.newest_folders", lambda: newest_folders(tmp_path))
    assert {times.device for times in committed_times()} == {"A100", "B200", "H100"}


def test_files_of_one_folder_are_put_together(tmp_path):
    skipped = {"length": 2, "dense": {}, "methods": {}, "failure": {"median_ms": None}}
    first = cell(1, [1.0] * 5, [1.0] * 5)
    fill(tmp_path, "H100", "1", first, skipped)
    later = (cell(1, [2.0] * 5, [1.0] * 5), cell(2, [1.0] * 5, [1.0] * 5, density=None))
    fill(tmp_path, "H100", "2", *later, skipped, name="results_more.json", commit="def")
    records = read_folder(tmp_path).parts["table7"]
    found = [(one["length"], one["commit"], bool(one["methods"])) for one in records]
    assert found == [(1, "def", True), (2, "def", False), (2, "def", True)]
    assert records[0]["methods"]["pbs"]["median_ms"] == 2.0
    fill(tmp_path, "A100", "3", name="results_other.json")
    with pytest.raises(ValueError, match="mixes results of A100 and H100"):
        read_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="make bench-gpu"):
        read_folder(tmp_path / "none")


def test_no_committed_number_comes_from_a_cold_call(tmp_path):
    """[12.5, 0.99] ms was a median of 6.75 and made a break-even of 12,934."""
    for folder in all_folders():
        write_tables(tmp_path, folder.parts)
        for path in tmp_path.iterdir():
            assert path.read_text() == (folder.path / path.name).read_text(), path.name
            assert ",12934.1" not in path.read_text()
            path.unlink()
        assert not list(folder.path.glob("ttft_*.csv"))
    old = committed_times(COMMITTED / "h100_2026-11-23b")
    selection = next(times for times in old if times.title.startswith("selection"))
    table = timing_table(selection)
    short = table[(table["tokens"] == "8192") & (table["variant"] == "pbs")]
    assert short["ms"].tolist() == ["cold"]
    assert "waits, ms" not in table
    points = break_even_table(selection).set_index(["method", "over dense"])
    assert points.loc[("pbs", "flash"), "break-even, tokens"] == "at or below 16384"
    assert points["fewest samples a time"].min() == 2


def test_the_command_says_what_it_left_out(tmp_path, capsys):
    fill(tmp_path, "H100", "1", cell(1, [9.0, 1.0, 1.0], [2.0] * 3))
    main([str(tmp_path)])
    assert "2 cold calls left out" in capsys.readouterr().out
    assert (tmp_path / "break_even.csv").exists()
    assert COMMITTED.is_dir()


def test_no_committed_speed_up_of_runs_made_one_after_another_lacks_its_interval():
    """The same setting was 1.33x in one place and 1.05x in another."""
    for path in COMMITTED.glob("needle*/*.csv"):
        heading = path.read_text().splitlines()[0].split(",")
        if path.stem.endswith("_answers"):
            continue
        assert "density" in heading
        assert "speed_up" not in heading or "speed_up_low" in heading

"""The leaderboard takes what raw samples prove, and names what they do not."""

import json
import shutil

import pandas as pd
import pytest
import yaml

from experiments.results import load
from experiments.tools.leaderboard import COLUMNS, main


def run(outputs, *words):
    return main(["--outputs", str(outputs), *map(str, words)])


def folder_of(outputs, bench, method):
    return next(
        path
        for path in sorted((outputs / bench / "tiny" / method).iterdir())
        if (path / "metrics.json").exists()
    )


def change_metrics(folder, **changes):
    metrics = json.loads((folder / "metrics.json").read_text())
    total = changes.pop("total", {})
    metrics["results"]["total"] |= total
    (folder / "metrics.json").write_text(json.dumps(metrics | changes))


def test_every_finished_run_is_a_row(outputs, tmp_path, capsys):
    out = tmp_path / "board.csv"
    assert run(outputs, "--out", out) == 0
    assert "1 runs without a result left out" in capsys.readouterr().out
    frame = pd.read_csv(out)
    assert tuple(frame.columns) == COLUMNS
    with pytest.warns(UserWarning, match="without a result"):
        assert set(frame["hash"]) == set(load(outputs)["hash"])
    needle = frame[frame["bench"] == "needle"]
    assert needle["score"].is_monotonic_decreasing
    assert (needle["score_unit"] == "accuracy, %").all()
    dense = needle[needle["method"] == "flash"].iloc[0]
    assert dense[["density", "coverage", "speed_up", "setting"]].tolist() == [1, 1, 1, "default"]
    assert set(needle["setting"]) == {"default", "threshold=0.5"}
    timed = frame[frame["bench"].isin(["attention", "ttft"])]
    assert (timed["speed_up"] > 0).all()
    assert (timed["speed_up_at"] == 512).all()
    assert frame["num_samples"].gt(0).all()
    assert run(outputs, "--check", out) == 0


def test_an_empty_folder_gives_an_empty_board(tmp_path):
    assert run(tmp_path, "--out", tmp_path / "a.csv") == 0
    assert tuple(pd.read_csv(tmp_path / "a.csv").columns) == COLUMNS
    with pytest.raises(SystemExit):
        run(tmp_path / "nothing")


def drop_hash(folder):
    change_metrics(folder, hash=None)


def edit_a_sample(folder):
    text = (folder / "samples.jsonl").read_text()
    (folder / "samples.jsonl").write_text(text.replace("true", "false").replace(": 1,", ": 2,"))


def drop_samples(folder):
    change_metrics(folder, samples_digest=None)  # as of an older run
    (folder / "samples.jsonl").unlink()


def drop_a_sample(folder):
    change_metrics(folder, samples_digest=None)
    lines = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    (folder / "samples.jsonl").write_text("".join(lines[:-1]))


def raise_the_score(folder):
    change_metrics(folder, total={"accuracy": 0.999})


def edit_the_settings(folder):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["method"]["threshold"] = 0.3
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def rename_the_folder(folder):
    folder.rename(folder.parent / "0123456789ab")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (drop_hash, "no config hash"),
        (edit_a_sample, "metrics.json was written for other samples than those in samples.jsonl"),
        (drop_samples, "samples.jsonl with the raw samples is missing"),
        (drop_a_sample, "speaks of 4 samples, samples.jsonl has 3"),
        (raise_the_score, "accuracy is 0.999 in metrics.json"),
        (edit_the_settings, "all three must be equal"),
        (rename_the_folder, "its folder 0123456789ab"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_run_without_proof_is_refused_by_name(own_outputs, tmp_path, capsys, spoil, reason):
    board = tmp_path / "board.csv"
    assert run(own_outputs, "--out", board) == 0
    num_rows = len(pd.read_csv(board))
    folder = folder_of(own_outputs, "needle", "meanpool")
    spoil(folder)
    assert run(own_outputs, "--out", tmp_path / "new.csv") == 1
    printed = capsys.readouterr().out
    assert "refused: " in printed
    assert f"{folder.parent}" in printed
    assert reason in printed
    rows = pd.read_csv(tmp_path / "new.csv")
    assert len(rows) == num_rows - 1
    # The row that was made before is refused, too, when somebody hands it in.
    assert run(own_outputs, "--check", board) == 1
    assert "refused: line " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hash": ""}, "no config hash"),
        ({"hash": "ffffffffffff"}, "no finished run with raw samples there"),
        ({"score": 101.0}, "score is 101.0 in the row"),
        ({"density": None}, "density is nan in the row"),
    ],
    ids=["no-hash", "unknown-hash", "other-score", "no-density"],
)
def test_a_row_that_its_run_does_not_give_is_refused(outputs, tmp_path, capsys, changes, reason):
    board = tmp_path / "board.csv"
    run(outputs, "--out", board)
    frame = pd.read_csv(board)
    number = frame.index[frame["bench"] == "needle"][1]
    for name, value in changes.items():
        frame.loc[number, name] = value
    frame.to_csv(board, index=False)
    capsys.readouterr()
    assert run(outputs, "--check", board) == 1
    printed = capsys.readouterr().out
    assert f"refused: line {number + 2}: " in printed
    assert reason in printed
    assert f"{len(frame) - 1} of {len(frame)} rows" in printed


def test_a_row_without_a_run_folder_is_refused(own_outputs, tmp_path, capsys):
    board = tmp_path / "board.csv"
    run(own_outputs, "--out", board)
    folder = folder_of(own_outputs, "needle", "pbs")
    shutil.rmtree(folder)
    assert run(own_outputs, "--check", board) == 1
    printed = capsys.readouterr().out
    assert f"{folder}: no finished run with raw samples there" in printed


def test_a_file_that_is_no_table_is_an_error(outputs, tmp_path):
    with pytest.raises(SystemExit):
        run(outputs, "--check", tmp_path / "nothing.csv")

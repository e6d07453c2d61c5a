"""Who is compared with whom: the plain dense run, sample by sample, on equal inputs."""

import json

import pandas as pd
import pytest

from experiments.pairing import pair_records
from experiments.report.compare import config_of, find_dense
from experiments.report.table import format_columns, make_rows, reading_notes
from tests.experiments.conftest import FAST


def change_samples(store, change):
    """Rewrite a run's samples, as an older or another version would have made them."""
    records = store.samples()
    for index, record in enumerate(records):
        change(index, record)
    store.samples_path.write_text("".join(json.dumps(record) + "\n" for record in records))
    metrics = json.loads(store.metrics_path.read_text())
    metrics["samples_digest"] = store.samples_digest()
    store.metrics_path.write_text(json.dumps(metrics))


def row_of(store):
    return next(row for row in make_rows([store.folder]) if row["path"] == str(store.folder))


def test_pairs_have_equal_ids_and_equal_inputs():
    ours = [
        {"sample_id": "a", "input_digest": "1", "answers": ["x"]},
        {"sample_id": "b", "input_digest": "1"},
        {"sample_id": "c", "input_digest": "1", "answers": ["x"]},
        {"sample_id": "d"},
        {"sample_id": "e", "input_digest": "1"},
    ]
    theirs = [
        {"sample_id": "e"},  # from before there were digests
        {"sample_id": "c", "input_digest": "1", "answers": ["y"]},
        {"sample_id": "b", "input_digest": "2"},
        {"sample_id": "a", "input_digest": "1", "answers": ["x"]},
        {"sample_id": "f"},
    ]
    pairs = pair_records(ours, theirs)
    assert [record["sample_id"] for record in pairs.ours] == ["a", "e"]
    assert [record["sample_id"] for record in pairs.theirs] == ["a", "e"]
    assert pairs.differing == ("b", "c")
    assert pairs.num_alone == 1


@pytest.mark.parametrize("seed", range(2))
def test_the_reference_is_the_plain_dense_run_whatever_the_hashes(run, seed):
    words = (f"seed={seed}", "bench.tasks=[copy]")
    plain = run("method=flash", *words)
    others = [
        run("method=flash", f"method.{setting}", *words)
        for setting in ("dense_below=1", "kernel=math", "dense_below=2", "dense_below=3")
    ]
    pbs = run("method=pbs", *words)
    assert find_dense(config_of(pbs.folder)).folder == plain.folder
    assert pbs.metrics()["against_dense"]["hash"] == plain.folder.name
    assert plain.metrics()["against_dense"] is None
    assert others[0].metrics()["against_dense"]["hash"] == plain.folder.name
    plain.metrics_path.unlink()
    assert find_dense(config_of(pbs.folder)) is None


def test_times_are_compared_with_the_fastest_dense_run_which_is_named(run):
    plain, math, pbs = (run(*words) for words in (
        ("method=flash",), ("method=flash", "method.kernel=math"), ("method=pbs",)
    ))  # fmt: skip
    seconds = {plain: 0.3, math: 0.1, pbs: 0.2}
    for store, value in seconds.items():
        change_samples(store, lambda _, record, value=value: record.update(prefill_seconds=value))
    row = row_of(pbs)
    assert row["speed_up"] == pytest.approx(0.5)
    assert row["speed_up_over"] == "flash kernel=math"
    assert row["dense_hash"] == plain.folder.name
    rows = make_rows([plain.folder, math.folder, pbs.folder])
    assert format_columns(rows)["difference to dense, points"][0] == "reference"
    assert format_columns(rows)["difference to dense, points"][1] != "reference"
    notes = "\n".join(reading_notes(rows))
    assert "speed-up: over flash kernel=math, the fastest dense run of the same device" in notes
    assert "to the plain dense run (flash, every parameter at its default)" in notes


def test_a_run_over_a_part_pairs_with_a_larger_dense_run(run):
    dense = run("method=flash", "bench.lengths=[512,768]", "bench.depths=[0.0,0.5]")
    part = run("method=pbs", "bench.lengths=[768]", "bench.tasks=[copy]", "bench.depths=[0.5]")
    paired = part.metrics()["against_dense"]
    assert (paired["hash"], paired["num_pairs"], paired["num_unpaired"]) == (
        dense.folder.name, 1, 0,
    )  # fmt: skip
    assert row_of(part)["speed_up"] > 0
    more = run("method=pbs", "bench.lengths=[768,1024]", "bench.tasks=[copy]")
    row = row_of(more)
    assert (row["num_pairs"], row["num_unpaired"]) == (1, 1)
    assert "timed 0 of the 1 samples" in row["no_speed_up"]
    text = "compared on 1 samples; 1 are not in the dense run"
    assert any(text in note for note in reading_notes([row]))
    # Another model setting is another family.
    assert run("method=pbs", "model.dtype=bfloat16").metrics()["against_dense"] is None


def test_samples_that_were_asked_something_else_are_counted_and_not_compared(run):
    dense, pbs = run("method=flash"), run("method=pbs")
    assert all(len(record["input_digest"]) == 16 for record in pbs.samples())
    change_samples(
        dense, lambda index, record: record.update(input_digest="other") if index else None
    )
    row = row_of(pbs)
    assert (row["num_pairs"], row["num_differing"]) == (1, 1)
    notes = "\n".join(reading_notes([row]))
    assert f"pbs: inputs differ: 1 samples were asked something else in the dense run and are not "\
        f"compared ({pbs.samples()[1]['sample_id']})" in notes  # fmt: skip
    change_samples(dense, lambda _, record: record.update(input_digest="other"))
    row = row_of(pbs)
    assert row["difference"] is None
    assert format_columns([row])["difference to dense, points"] == ["other inputs"]
    change_samples(dense, lambda _, record: record.pop("input_digest"))  # an older run
    assert row_of(pbs)["num_pairs"] == 2


def test_edited_samples_are_never_shown_as_a_result(run, caplog, command, tmp_path):
    run("method=flash")
    store = run("method=pbs")
    before = store.samples_path.read_text()
    store.samples_path.write_text(before.replace('"correct": true', '"correct": false', 1))
    edited = store.samples_path.read_text() != before
    if not edited:
        store.samples_path.write_text(before.replace('"correct": false', '"correct": true', 1))
    (row,) = make_rows([store.folder], adds_dense=False)
    assert row["status"] == "broken"
    caplog.clear()
    status, printed = command(*FAST, f"paths.outputs={tmp_path}", "method=pbs")
    assert status == 1
    assert "was written for other samples than those in samples.jsonl" in printed
    assert "broken" in printed
    store.samples_path.write_text(before)
    assert store.metrics()["status"] == "finished"
    assert command(*FAST, f"paths.outputs={tmp_path}", "method=pbs")[0] == 0


def test_a_smaller_command_leaves_the_larger_table_and_picture(command, tmp_path):
    group = tmp_path / "out" / "needle" / "tiny"
    large = (*FAST, "paths.outputs=out", "bench.depths=[0.0,0.5,1.0]")
    small = (*FAST, "paths.outputs=out")
    assert command("-m", *large, "method=flash,pbs")[0] == 0
    picture = (group / "accuracy_density.png").read_bytes()
    status, printed = command("-m", *small, "method=pbs,meanpool")
    assert status == 0
    table = pd.read_csv(group / "summary.csv")
    assert sorted(table["num_samples"]) == [2, 2, 6, 6]
    assert table["sample_set"].nunique() == 2
    text = (group / "summary.md").read_text()
    assert text.count("| method |") == 2
    assert "2 samples a method, samples " in text
    assert "difference to dense: to the plain dense run" in text
    assert (group / "accuracy_density.png").read_bytes() == picture
    (small_set,) = set(table.loc[table["num_samples"] == 2, "sample_set"])
    assert (group / f"samples-{small_set}" / "accuracy_density.png").exists()
    assert "no dense run" not in printed
    assert "the rows are of different samples" in printed  # the dense run has more
    # A larger one takes over, and the former largest keeps its picture beside it.
    larger = (*FAST, "paths.outputs=out", "bench.depths=[0.0,0.25,0.5,1.0]")
    assert command(*larger, "method=pbs")[0] == 0
    (large_set,) = set(table.loc[table["num_samples"] == 6, "sample_set"])
    assert (group / f"samples-{large_set}" / "accuracy_density.png").read_bytes() == picture
    assert (group / "accuracy_density.png").read_bytes() != picture

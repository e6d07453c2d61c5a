"""Published scores: data that is well formed, and a comparison that claims nothing it has not."""

import json

import pandas as pd
import pytest
import yaml

from experiments.benches.opencompass.longbench import CATEGORIES
from experiments.benches.opencompass.ruler import LENGTHS
from experiments.report.published_scores import (
    COLUMNS,
    FOLDER,
    compare_published,
    format_published,
    load_published,
)
from experiments.settings.bench_names import BENCHES
from experiments.settings.config import CONF
from pbs.methods import METHODS

BENCH_NAMES = ("longbench", "longbench_v2", "ruler")


@pytest.mark.parametrize("bench", BENCH_NAMES)
def test_the_numbers_name_what_exists(bench):
    scores = load_published(bench)
    quantities = {"average", *CATEGORIES, *map(str, LENGTHS)}
    for score in scores:
        assert score.method in METHODS.names
        assert (CONF / "model" / f"{score.model}.yaml").is_file()
        assert 0 < score.value < 100
        assert score.quantity in quantities
        assert score.source
        assert score.setting
    keys = [(s.source, s.model, s.method, s.quantity) for s in scores]
    assert len(keys) == len(set(keys))


def test_some_numbers_of_the_paper():
    def value(bench, model, method, quantity="average"):
        return next(
            score.value
            for score in load_published(bench, model)
            if (score.method, score.quantity) == (method, quantity)
        )

    assert value("longbench", "llama31_8b", "flash") == 38.28
    assert value("longbench", "llama31_8b", "pbs", "synthetic") == 63.80
    assert value("longbench_v2", "qwen25_7b_1m", "meanpool") == 26.24
    assert value("ruler", "qwen25_7b_1m", "pbs_plus", "131072") == 73.71
    assert load_published("needle") == []
    assert {path.stem for path in FOLDER.glob("*.yaml")} <= set(BENCHES.names)


def write_run(group, method, digest, metrics, **settings):
    folder = group / method / digest
    folder.mkdir(parents=True)
    config = {
        "model": {"path": "x"},
        "method": {"name": method, **settings},
        "bench": {"name": group.parent.name},
        "logger": {},
        "paths": {},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.json").write_text(json.dumps(metrics))


def finished(score, *, partial=False, status="finished"):
    total = {"score": score, "by_category": {"synthetic": {"score": score + 1}}}
    return {"status": status, "partial": partial, "results": {"total": total, "cells": []}}


def row_of(frame, method, quantity="average", source="LongBench table"):
    rows = frame[(frame["method"] == method) & (frame["quantity"] == quantity)]
    return rows[rows["source"].str.startswith("PBS") & rows["source"].str.endswith(source)].iloc[0]


def test_ours_published_and_the_difference(tmp_path):
    group = tmp_path / "longbench" / "llama31_8b"
    write_run(group, "flash", "a", finished(39.0))
    write_run(group, "pbs", "b", finished(30.0), threshold=0.5)
    write_run(group, "pbs", "c", finished(37.0, partial=True))
    write_run(group, "meanpool", "d", finished(36.0, status="failed"))
    write_run(group, "xattention", "e", {"status": "failed"})
    write_run(group, "minference", "f", finished(35.0), preset="adaptive")
    frame = compare_published(group)
    assert tuple(frame.columns) == COLUMNS
    row = row_of(frame, "flash")
    assert (row["status"], row["ours"], row["hash"]) == ("finished", 39.0, "a")
    assert row["difference"] == pytest.approx(0.72)
    assert row_of(frame, "flash", "synthetic")["difference"] == pytest.approx(40 - 66.82)
    assert row_of(frame, "pbs")[["status", "ours"]].tolist() == ["partial", 37.0]
    assert row_of(frame, "meanpool")["status"] == "partial"
    assert row_of(frame, "xattention")["status"] == "failed"
    assert row_of(frame, "minference")["status"] == "other setting"
    assert row_of(frame, "flexprefill")["status"] == "not run"
    assert pd.isna(row_of(frame, "flexprefill")["ours"])
    shared = frame[frame["method"] == "pbs gqa=shared"].iloc[0]
    assert shared["status"] == "other setting"


def test_a_run_at_the_published_parameters_is_found(tmp_path):
    group = tmp_path / "longbench" / "llama31_8b"
    write_run(group, "pbs", "a", finished(37.3), gqa="shared")
    frame = compare_published(group)
    shared = frame[frame["method"] == "pbs gqa=shared"].iloc[0]
    assert (shared["status"], shared["ours"]) == ("finished", 37.3)
    assert row_of(frame, "pbs")["status"] == "other setting"


def test_the_text_marks_gaps_and_other_harnesses(tmp_path):
    group = tmp_path / "longbench" / "llama31_8b"
    write_run(group, "flash", "a", finished(39.0))
    text = format_published(compare_published(group))
    assert "| flash | average | 39.00 | 38.28 | +0.72 | finished |" in text
    assert "| flexprefill | average | – | 30.56 | – | not run |" in text
    assert "| prism | average | – | 41.08 | – | not run; harness: prism |" in text


def test_nothing_is_published_for_other_models(tmp_path):
    frame = compare_published(tmp_path / "longbench" / "tiny")
    assert frame.empty
    assert tuple(frame.columns) == COLUMNS


def test_a_broken_run_is_left_out_and_named(tmp_path, caplog):
    group = tmp_path / "longbench" / "llama31_8b"
    write_run(group, "flash", "a", finished(39.0))
    write_run(group, "flash", "b", finished(1.0))
    (group / "flash" / "b" / "config.yaml").write_text("model: [")
    assert row_of(compare_published(group), "flash")["hash"] == "a"
    assert "flash/b is left out" in caplog.text

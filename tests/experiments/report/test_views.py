"""Tables and pictures of the report and the notebooks."""

import dataclasses
import json
import shutil
from dataclasses import replace

import pandas as pd
import pytest
from matplotlib.figure import Figure

from experiments.report import (
    coverage_views,
    figures,
    missing,
    tables,
    time_figures,
    times,
)
from experiments.report.device_tables import beside_table7
from experiments.report.notebook import compare_with_runs
from experiments.report.pictures.looks import look_of, save
from experiments.report.runs import Group, Run, read_results


@pytest.fixture(scope="module")
def results(outputs):
    return read_results(outputs)


@pytest.fixture
def needle(results):
    return results.of("needle")[0]


def test_runs_are_grouped_by_what_they_were_asked(results, needle):
    assert [group.bench for group in results.groups] == ["attention", "coverage", "needle", "ttft"]
    assert needle.title == "needle on tiny"
    assert [run.label for run in needle.runs] == ["flash", "pbs", "pbs threshold=0.5", "meanpool"]
    assert results.answering == [needle]
    assert [group.bench for group in results.timing] == ["attention", "ttft"]
    assert [problem.status for problem in results.problems] == ["interrupted"]


def test_another_seed_is_another_group_and_says_so(own_outputs):
    flash = own_outputs / "needle" / "tiny" / "flash"
    interrupted = next(path for path in flash.iterdir() if not (path / "metrics.json").exists())
    finished = next(path for path in flash.iterdir() if (path / "metrics.json").exists())
    for name in ("metrics.json", "samples.jsonl"):
        shutil.copy(finished / name, interrupted)
    assert [group.note for group in read_results(own_outputs).of("needle")] == ["seed=0", "seed=1"]


def test_results_may_be_moved(own_outputs, monkeypatch):
    """Runs find their dense partner where they lie, not where they were made."""
    monkeypatch.chdir(own_outputs.parent)
    group = read_results("outputs").of("needle")[0]
    assert group.dense is not None
    assert all(row["difference"] is not None for row in group.rows[1:])
    shutil.rmtree(own_outputs / "needle" / "tiny" / "flash")
    group = read_results("outputs").of("needle")[0]
    sentence = tables.paired_table(group)
    assert "python run.py method=flash bench=needle" in sentence
    assert figures.draw_differences(group) == sentence


def with_cells(group: Group, cells: dict[str, list[dict]]) -> Group:
    """The group with other cells, by label."""

    def change(run: Run) -> Run:
        return replace(run, metrics={**run.metrics, "results": {"cells": cells[run.label]}})

    return replace(group, runs=tuple(change(run) for run in group.runs if run.label in cells))


def cell(task, accuracy, density):
    return {
        "task": task,
        "length": 512,
        "accuracy": accuracy,
        "density": density,
        "num_samples": 20,
    }


def test_the_winner_has_the_highest_accuracy_and_then_the_lowest_density(needle):
    group = with_cells(
        needle,
        {
            "flash": [cell("a", 1.0, 1.0), cell("b", 0.9, 1.0)],
            "pbs": [cell("a", 0.8, 0.5), cell("b", 0.7, 0.5)],
            "meanpool": [cell("a", 0.8, 0.6), cell("b", 0.75, 0.6)],
            "pbs threshold=0.5": [cell("a", 0.5, 0.2), cell("b", 0.75, 0.2)],
        },
    )
    table = tables.winners(group).set_index("task")
    assert table["best"].to_dict() == {"a": "pbs", "b": "pbs threshold=0.5"}
    assert table.loc["a", ["accuracy, %", "dense", "tied", "ahead"]].tolist() == [80, 100, 1, 30]
    assert table.loc["b", ["tied", "ahead"]].tolist() == [1, 5]
    assert table["samples"].tolist() == [20, 20]
    assert tables.wins(group)["cells won"].to_dict() == {"pbs": 1, "pbs threshold=0.5": 1}
    only_dense = with_cells(needle, {"flash": [cell("a", 1.0, 1.0)]})
    assert "No sparse method" in tables.winners(only_dense)


def test_an_interval_that_holds_zero_shows_no_difference(needle):
    rows = [
        needle.rows[0],
        needle.rows[1] | {"difference": -0.1, "low": -0.2, "high": 0.01, "p_value": 0.1},
        needle.rows[2] | {"difference": -0.1, "low": -0.2, "high": -0.01, "p_value": 0.01},
        needle.rows[3] | {"difference": 0.1, "low": 0.01, "high": 0.2, "p_value": 0.01},
    ]
    table = tables.paired_table(replace(needle, rows=tuple(rows)))
    assert table["reading"].tolist() == [
        *("no difference shown", "worse than dense", "better than dense"),
    ]
    assert table.index.tolist() == [2, 3, 4]


def test_no_run_of_the_front_is_beaten():
    frame = pd.DataFrame(
        {"x": [0.2, 0.2, 0.4, 0.6, 0.6, 1.0], "y": [1.0, 2.0, 1.5, 3.0, 3.0, 3.0]},
        index=[1, 2, 3, 4, 5, 6],
    )
    assert figures.pareto_front(frame, "x", "y").index.tolist() == [2, 4]


@pytest.mark.parametrize("name", ["draw_pareto", "draw_differences", "draw_coverage"])
def test_pictures_of_answers(needle, name, tmp_path):
    figure = getattr(figures, name)(needle)
    assert save(figure, tmp_path / "a.png").stat().st_size > 5000
    colours = {
        line.get_color()
        for axes in figure.axes
        for line in axes.lines
        if line.get_marker() == look_of("pbs").marker
    }
    assert colours == {look_of("pbs").colour}


def test_a_group_without_answers_gets_sentences(results):
    group = results.of("ttft")[0]
    assert "answers" in figures.draw_pareto(group)
    assert isinstance(figures.draw_coverage(group), str)
    assert isinstance(tables.winners(group), str)


def test_layers_stand_beside_each_other(needle):
    table = tables.layer_table(needle)
    assert table.index.tolist() == [0, 1]
    assert (table["1 flash"] == 1).all(axis=None)
    assert table["2 pbs", "density"].between(0.3, 1).all()


def test_times_of_two_environments_stand_apart(results):
    group = results.of("attention")[0]
    records = [record for run in group.runs for record in run.samples()]
    moved = [{**record, "environment": f"e{index % 2}"} for index, record in enumerate(records)]

    class Run:
        metrics = group.runs[0].metrics

        def samples(self):
            return moved

    apart = times.times_of(dataclasses.replace(group, runs=(Run(),)))
    assert [len({one["environment"] for one in found.records}) for found in apart] == [1, 1]
    assert [found.title.rpartition(" ")[2] for found in apart] == ["e0", "e1"]


def test_times_of_a_group(results, tmp_path):
    ours = times.times_of(results.of("attention")[0])[0]
    table = times.timing_table(ours)
    assert len(table) == 8  # two lengths, two runs, dense and method in each
    assert (table["ms"] != "").all()
    figure = time_figures.draw_breakdown(ours)
    assert [axes.get_title() for axes in figure.axes] == ["256 tokens", "512 tokens"]
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == ["pbs"] or labels == ["pbs", "meanpool"]
    for draw in (time_figures.draw_breakdown, time_figures.draw_speed_up, time_figures.draw_floor):
        figure = draw(ours)
        assert isinstance(figure, Figure)
        assert save(figure, tmp_path / "a.png").stat().st_size > 5000
    points = times.break_even_table(ours)
    assert set(points["over dense"]) >= {"fastest"}


def test_stages_add_up_in_units_of_the_dense_time():
    """Two lengths, one method: 6 of 10 ms, and 8 of 4 ms; the rest is what is not attention."""
    records = tuple(
        {
            "length": length,
            "target_density": None,
            "dense": {"flash": {"median_ms": dense, "p20_ms": dense, "p80_ms": dense}},
            "methods": {
                "pbs": {
                    "median_ms": total,
                    "p20_ms": total,
                    "p80_ms": total,
                    "dense_reason": "",
                    "stages_ms": {"order": 1.0, "selection": 1.0, "gather": 0.5, "attention": 2.5},
                    "speed_up": {"flash": dense / total},
                    "speed_up_over_fastest": dense / total,
                }
            },
        }
        for length, dense, total in ((512, 4.0, 8.0), (1024, 10.0, 6.0))
    )
    ours = times.Times("t", "device", records)
    figure = time_figures.draw_breakdown(ours)
    widths = [[bar.get_width() for bar in axes.patches] for axes in figure.axes]
    assert widths[0] == pytest.approx([0.25, 0.25, 0.125, 0.625, 0.75])
    assert widths[1] == pytest.approx([0.1, 0.1, 0.05, 0.25, 0.1])
    table = times.break_even_table(ours).set_index("over dense")
    assert 512 < float(table.loc["fastest", "break-even, tokens"]) < 1024
    assert "no floor" in time_figures.draw_floor(ours).lower()
    one = times.Times("t", "device", records[:1])
    assert "Two lengths" in time_figures.draw_speed_up(one)


@pytest.mark.parametrize(("num", "expected"), [(2, "3.00 (n = 2)"), (5, "3.00 [3.00, 3.00]")])
def test_few_calls_have_no_percentiles_whatever_their_record_says(num, expected):
    entry = {"median_ms": 3.0, "p20_ms": 3.0, "p80_ms": 3.0, "samples_ms": [3.0] * num}
    entry |= {"dense_reason": "", "speed_up": {}, "speed_up_over_fastest": None}
    record = {"length": 512, "dense": {"flash": entry}, "methods": {"pbs": entry}}
    ours = times.Times("t", "device", (record,))
    assert times.timing_table(ours)["ms"].tolist() == [expected, expected]


def test_committed_times_can_be_drawn():
    found = times.committed_times()
    assert found
    for one in found:
        assert isinstance(time_figures.draw_breakdown(one), Figure)
        assert isinstance(time_figures.draw_speed_up(one), Figure)
    tables = [table for _, table, _ in beside_table7(found)]
    assert tables
    for table in tables:
        assert {"8192", "131072"} <= set(table["tokens"])
        # Only times at the published density stand beside the published ones.
        at = dict(zip(table["tokens"], table["density"], strict=True))
        assert at["131072"] == "0.219"


def test_coverage_runs(results):
    group = results.of("coverage")[0]
    table = coverage_views.needed_density(group)
    assert table["method"].tolist() == ["pbs", "meanpool"]
    assert all(0 < float(text.removeprefix("≤ ")) <= 100 for text in table["for 80 %"])
    assert coverage_views.drawn_together(group)


def test_what_is_missing_comes_with_commands(results):
    table = missing.missing_table(results).set_index("what")
    methods = table[table.index.str.contains("sparse methods in needle")].iloc[0]
    assert "xattention" in methods["command"]
    assert "pbs," not in methods["command"].replace("pbs_plus,", "")
    assert "bench=longbench" in table.loc["bench longbench", "command"]
    assert any("longbench on llama31_8b" in what for what in table.index)
    assert any(what.startswith("interrupted: needle/tiny/flash/") for what in table.index)


def test_own_answers_pair_with_finished_runs(results, needle, tmp_path):
    records = needle.runs[0].samples()
    table = compare_with_runs(records, results).set_index("finished run")
    assert table.loc["flash", ["pairs", "difference, points"]].tolist() == [4, 0]
    assert set(table.index) == {run.label for run in needle.runs}
    assert "make demo" in compare_with_runs(records, read_results(tmp_path))


def test_metrics_of_another_version_are_a_problem_and_no_error(own_outputs):
    folder = next((own_outputs / "needle" / "tiny" / "meanpool").iterdir())
    metrics = json.loads((folder / "metrics.json").read_text())
    del metrics["results"]
    (folder / "metrics.json").write_text(json.dumps(metrics))
    broken = [p for p in read_results(own_outputs).problems if p.status == "broken"]
    assert [problem.folder for problem in broken] == [folder]
    assert "results" in broken[0].reason

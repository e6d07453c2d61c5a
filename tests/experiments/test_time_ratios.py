"""Speed-ups between runs made one after another: intervals, counts and the machine's load."""

import pytest

from experiments.report.table import format_columns, make_rows, reading_notes
from experiments.report.timing_table import speed_up_text
from experiments.time_ratios import compare_paired_times, median_interval


def test_a_median_has_an_interval_from_six_values_on():
    assert median_interval([1.0] * 5) is None
    found = median_interval([6, 2, 3, 4, 5, 1])
    assert (found.low, found.high) == (1, 6)
    found = median_interval(list(range(1, 26)))  # 25 values: the 8th and the 18th, as in tables
    assert (found.low, found.high) == (8, 18)


@pytest.mark.parametrize("num", [6, 12, 25])
def test_the_interval_holds_the_median_as_often_as_it_says(num):
    import numpy as np

    draws = np.random.default_rng(0).lognormal(size=(2000, num))
    hits = [found.low <= 1.0 <= found.high for found in map(median_interval, draws)]
    assert 0.94 < sum(hits) / len(hits) <= 1.0


def test_speed_ups_pair_sample_by_sample():
    """Slow prompts are slow in both runs: the ratio of each is 2."""
    found = compare_paired_times([2.0, 8.0, 20.0, 2.2, 6.0, 4.0], [1.0, 4.0, 10.0, 1.1, 3.0, 2.0])
    assert found["speed_up"] == pytest.approx(2.0)
    assert found["speed_up_low"] == pytest.approx(2.0)
    assert found["speed_up_pairs"] == 6
    assert compare_paired_times([2.0], [1.0])["speed_up_low"] is None


def test_a_ratio_is_written_with_its_ends_and_count():
    row = {"speed_up": 1.33, "speed_up_low": 1.05, "speed_up_high": 1.4, "speed_up_pairs": 25}
    assert speed_up_text(row) == "1.33x [1.05, 1.40] (25)"
    assert speed_up_text({**row, "speed_up_low": None, "speed_up_pairs": 3}) == "1.33x (3)"
    assert speed_up_text({"speed_up": None}) == ""


@pytest.fixture
def two_runs(compose_cell, monkeypatch):
    """Dense and PBS on the same six prompts; others keep 60 % of the processors busy."""
    from experiments.run.runner import run_cell

    monkeypatch.setattr("experiments.machine_load.LoadMeter.lap", lambda _: 0.6)
    words = ("bench.num_samples=2", "bench.lengths=[512]", "bench.depths=[0.0,0.5,1.0]")
    return [
        run_cell(compose_cell(f"method={name}", "bench=needle", "model=tiny", *words))
        for name in ("flash", "pbs")
    ]


def test_a_table_says_how_sure_a_speed_up_is_and_how_busy_the_machine_was(two_runs):
    rows = make_rows(two_runs)
    dense, ours = rows
    assert ours["speed_up_low"] <= ours["speed_up"] <= ours["speed_up_high"]
    assert ours["speed_up_pairs"] == ours["num_samples"] >= 6
    assert (ours["load"], ours["dense_load"]) == (pytest.approx(0.6), pytest.approx(0.6))
    assert format_columns(rows)["speed-up over dense"] == ["1.00x", speed_up_text(ours)]
    notes = "\n".join(reading_notes(rows))
    assert "its 95 % interval" in notes
    assert "what changed between the two runs is not in it" in notes
    assert "pbs: other processes kept 60% of the processors busy" in notes
    assert "pbs: in the dense run other processes kept 60%" in notes
    assert dense["speed_up"] == 1.0

"""Selection takes memory that grows with N and T², not with N². Linux only."""

import json

import pandas as pd
import pytest

from experiments.tools import selection_memory
from experiments.tools.selection_memory import CASES, RESULT, Case, main, measure
from pbs.methods import METHODS

# Bytes of what must never be whole: [Hq, B, N] probabilities of the last queries at 32K tokens.
PROBABILITIES_MIB = 8 * 128 * 32768 * 4 // selection_memory.MIB


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=[case.label for case in CASES])
def test_selection_at_32k_tokens_stays_below_its_bound(case):
    measured = measure(case)
    assert 0 <= measured["plan_mib"] <= measured["peak_mib"] + 1
    assert measured["peak_mib"] <= case.bound_mib, measured


def test_every_method_has_a_case():
    assert {case.method for case in CASES} == set(METHODS.names)


def test_committed_result_has_every_case_within_its_bound():
    frame = pd.read_csv(RESULT, keep_default_na=False)
    labels = [f"{row.method} {row.setting}".strip() for row in frame.itertuples()]
    assert labels == [case.label for case in CASES]
    assert (frame["peak_mib"] <= frame["bound_mib"]).all()
    assert list(frame["bound_mib"]) == [case.bound_mib for case in CASES]
    assert (frame["num_tokens"] == 32768).all()
    assert frame[["torch", "python", "commit", "device", "time"]].ne("").all().all()
    fast = frame[frame["method"] == "flexprefill"]
    assert (fast["peak_mib"] < PROBABILITIES_MIB).all()


def test_a_measurement_sees_what_the_plan_keeps_and_little_more():
    ordered = measure(Case("pbs", 0, "", {"order": "avg_query"}), num_tokens=8192)
    # The keys in plan order, 16 MiB, are part of the plan.
    assert 16 <= ordered["plan_mib"] <= 18
    assert ordered["plan_mib"] <= ordered["peak_mib"] + 1 <= 64


def test_the_script_writes_one_row_per_case(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(selection_memory, "CASES", (CASES[0],))
    answer = {"peak_mib": 3, "plan_mib": 1, "seconds": 0.1, "density": 1.0}
    monkeypatch.setattr(selection_memory, "measure", lambda case, **_: answer)
    main(["--output", str(tmp_path / "new" / "result.csv"), "--num-tokens", "4096"])
    (row,) = pd.read_csv(tmp_path / "new" / "result.csv").to_dict("records")
    assert (row["method"], row["num_tokens"], row["peak_mib"]) == ("flash", 4096, 3)


def test_a_child_process_answers_in_json(capsys):
    main(["--num-tokens", "256", "--case", '{"method": "flash", "params": {}}'])
    assert json.loads(capsys.readouterr().out)["density"] == 1.0

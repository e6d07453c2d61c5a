"""Scores, densities and coverage of every method stay what ``needle.json`` says."""

import json

import pytest

from experiments.settings.config import CONF
from pbs.methods import METHODS
from tests.golden import measure, update
from tests.methods.cases import CASES

ROW = {"score": 0.75, "density": 0.3275, "coverage": 0.8518}


def test_numbers_of_every_method_stay():
    moved = measure.differences(measure.read(), measure.measure())
    if moved:
        pytest.fail(
            f"not as in {measure.PATH.name}:\n"
            + "\n".join(moved)
            + f"\nIf that is meant, run `{update.COMMAND}` and commit the file with the change; "
            "CONTRIBUTING.md, 'Numbers that stay', says when it is.",
            pytrace=False,
        )


def test_every_method_config_and_case_is_in_the_file():
    configs = {f"conf/method/{path.name}" for path in (CONF / "method").glob("*.yaml")}
    assert set(measure.read()) == configs | {f"case {case}" for case in CASES}
    assert {name for name, _, _ in CASES.values()} == set(METHODS.names)


def test_one_unit_of_the_last_digit_and_more_is_a_difference_rounding_is_not():
    old = {"case pbs": ROW}
    assert measure.differences(old, {"case pbs": {**ROW, "density": 0.32758}}) == []
    assert measure.differences(old, {"case pbs": {**ROW, "density": 0.32768}}) == [
        "case pbs: density was 0.3275, is 0.3277"
    ]
    assert measure.differences(old, {"case pbs": {**ROW, "score": float("nan")}})
    assert measure.differences(old, {}) == ["case pbs: only in the file"]
    assert measure.differences({}, old) == ["case pbs: only in the code"]


@pytest.fixture
def file(monkeypatch, tmp_path):
    path = tmp_path / "needle.json"
    path.write_text(json.dumps({"case pbs": ROW}))
    for module in (measure, update):
        monkeypatch.setattr(module, "PATH", path)
    return path


def test_update_says_what_moved_and_writes_it(file, monkeypatch, capsys):
    new = {"case pbs": {**ROW, "density": 0.41234}}
    monkeypatch.setattr(update, "measure", lambda **_: new)
    assert update.main() == 0
    assert "case pbs: density was 0.3275, is 0.4123" in capsys.readouterr().out
    assert measure.read() == {"case pbs": {**ROW, "density": 0.4123}}
    assert len(file.read_text().splitlines()) == 3


def test_update_refuses_numbers_that_hang_on_rounding(file, monkeypatch, capsys):
    before = file.read_text()

    def measured(noise=0.0, noise_seed=0):
        return {"case pbs": {**ROW, "coverage": 0.85 + (0.01 if noise else 0)}}

    monkeypatch.setattr(update, "measure", measured)
    assert update.main() == 1
    assert "SEED" in capsys.readouterr().out
    assert file.read_text() == before

"""Samples of two environments stay apart, and env.json says what results depend on."""

import json

import pytest

from experiments.report.table import format_columns, make_rows, reading_notes
from experiments.run import runner
from experiments.run_environments import differing_parts, environment_id, prefill_times
from experiments.settings import environment as environment_module
from experiments.settings.environment import describe_environment
from pbs.methods import crossover
from pbs.ops.block_sparse_attention import tuned


def env(**changes):
    return {**describe_environment(), **changes}


def test_the_id_names_what_changes_results_and_nothing_else():
    plain = env()
    assert plain["id"] == environment_id(plain)
    for same in ({"time": "later"}, {"commit": "another"}, {"is_dirty": True}, {"num_cpus": 999}):
        assert environment_id({**plain, **same}) == plain["id"]
    for other in (
        {"source": "another"},
        {"packages": {**plain["packages"], "torch": "1.0"}},
        {"num_threads": 99},
        {"device": "another"},
        {"variables": {"OMP_WAIT_POLICY": "PASSIVE"}},
    ):
        assert environment_id({**plain, **other}) != plain["id"]


def test_differences_are_named():
    plain = env()
    packages = {**plain["packages"], "torch": "1.0"}
    other = {**plain, "packages": packages, "num_threads": 99}
    assert differing_parts(plain, other) == ["num_threads", "packages.torch"]


def test_launch_options_and_crossover_stand_in_the_environment(tmp_path, monkeypatch):
    table, rows = tmp_path / "options.json", tmp_path / "rows.csv"
    monkeypatch.setenv(tuned.VARIABLE, str(table))
    monkeypatch.delenv(crossover.VARIABLE, raising=False)
    without = describe_environment()
    assert without["launch_options"] is None
    assert without["crossover"][crossover.VARIABLE] is None
    assert without["crossover"]["packaged"]
    table.write_text(json.dumps({"some GPU | Triton 3 | triton head_dim=128": {"num_warps": 4}}))
    rows.write_text(crossover.PACKAGED.read_text())
    monkeypatch.setenv(crossover.VARIABLE, str(rows))
    tuned.read_table.cache_clear()
    found = describe_environment()
    assert found["launch_options"]["num_entries"] == 1
    assert found["launch_options"]["digest"]
    assert found["crossover"][crossover.VARIABLE] == found["crossover"]["packaged"]
    assert found["id"] != without["id"]
    assert str(tmp_path) not in json.dumps(found)
    table.write_text("[")
    tuned.read_table.cache_clear()
    assert "JSONDecodeError" in describe_environment()["launch_options"]["error"]
    tuned.read_table.cache_clear()


def test_variables_that_change_results_are_listed(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert describe_environment()["variables"]["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "TRITON_INTERPRET" in environment_module.VARIABLES


def test_a_median_never_mixes_two_environments():
    records = [{"prefill_seconds": 1.0, "environment": name} for name in "aab"]
    assert prefill_times(records[:2])["prefill_seconds"] == 1.0
    mixed = prefill_times(records)
    assert (mixed["prefill_seconds"], mixed["prefill_p20"], mixed["prefill_p80"]) == (None,) * 3
    assert mixed["no_time"] == (
        "3 samples were timed in 2 environments; resume=false measures again"
    )
    # Older samples name none: a run of such alone is of one, one that was continued is of two.
    assert prefill_times([{"prefill_seconds": 1.0}])["prefill_seconds"] == 1.0
    assert prefill_times([{"prefill_seconds": 1.0}, records[0]])["prefill_seconds"] is None


@pytest.fixture
def continued(run, monkeypatch):
    """A run of PBS that begins here and ends under other code."""

    def make(*words):
        store = run("method=pbs", *words)
        first, _ = store.samples_path.read_text().splitlines(keepends=True)
        store.samples_path.write_text(first)
        store.metrics_path.unlink()
        other = env(source="another")
        with monkeypatch.context() as patch:
            patch.setattr(
                runner, "describe_environment", lambda: {**other, "id": environment_id(other)}
            )
            run("method=pbs", *words)
        return store

    return make


def test_a_run_continued_under_other_code_keeps_its_samples_apart(run, continued):
    run("method=flash")
    store = continued()
    names = [record["environment"] for record in store.samples()]
    assert len(set(names)) == 2
    assert set(store.environments()) == set(names)
    metrics = store.metrics()
    assert metrics["environments"] == dict.fromkeys(names, 1)
    assert metrics["results"]["total"]["prefill_seconds"] is None
    assert metrics["results"]["total"]["accuracy"] is not None
    # Each cell has one sample, of one environment.
    assert all(cell["prefill_seconds"] for cell in metrics["results"]["cells"])
    rows = make_rows([store.folder])
    columns = format_columns(rows)
    assert columns["speed-up over dense"] == ["1.00x", "–"]
    assert next(texts for name, texts in columns.items() if name.startswith("prefill"))[1] == "–"
    notes = "\n".join(reading_notes(rows))
    assert "pbs: its samples come from 2 environments" in notes
    assert "pbs: no time: 2 samples were timed in 2 environments; resume=false" in notes


def test_times_of_another_environment_give_no_speed_up(run, monkeypatch):
    store = run("method=pbs")
    other = env(num_threads=99)
    with monkeypatch.context() as patch:
        patch.setattr(
            runner, "describe_environment", lambda: {**other, "id": environment_id(other)}
        )
        run("method=flash")
    rows = make_rows([store.folder])
    assert "speed_up" not in rows[1]
    assert "flash (" in rows[1]["no_speed_up"]
    assert "was timed in another environment (num_threads differ)" in rows[1]["no_speed_up"]
    assert rows[1]["difference"] is not None

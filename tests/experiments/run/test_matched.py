"""Comparisons at equal density or coverage: the search, the held-out prompts, the cells."""

import json

import pytest

from experiments.benches.needle import HELD_OUT_INDEX, NeedleBench
from experiments.notes import notes_of
from experiments.report.table import make_rows
from experiments.results import load
from experiments.run import matched
from experiments.run.matched import Trial, _conclude, search
from experiments.settings.config import ConfigError, MatchConfig, RunConfig
from pbs.methods import METHODS, Knob, build_method
from pbs.testing import make_qkv

UP = Knob("threshold", low=0.0, high=1.0)
COUNT = Knob("size", low=1, high=1 << 20, is_integer=True)
WITH_KNOB = [name for name in METHODS.names if METHODS.load(name).knob is not None]
MATCH = ("match=density", "bench.lengths=[1024]")


def follow(function, knob, **settings):
    """The search on a known function of the knob; trials and conclusion."""
    match = MatchConfig(**settings)
    path = search(lambda value: Trial(value, function(value), 1.0), knob, match)
    return path, _conclude(path, knob, match, ["p0"])


@pytest.mark.parametrize("target", [0.05, 0.25, 0.7, 0.99])
def test_bisection_meets_the_target(target):
    path, found = follow(lambda x: x**2, UP, target=target)
    assert found.is_met
    assert abs(found.value**2 - target) <= 0.005
    assert found.held_out == found.value**2
    assert len(path) <= 12
    assert [trial.value for trial in path[:3]] == [0.0, 1.0, 0.5]


def test_a_knob_may_lower_the_density():
    _, found = follow(lambda x: 1 - x, Knob("k", 0.0, 1.0, increases_density=False), target=0.3)
    assert abs(found.value - 0.7) <= 0.005


def test_counts_are_halved_by_ratio_and_stay_counts():
    path, found = follow(lambda x: min(1.0, x / 5000), COUNT, target=0.3)
    assert found.is_met
    assert all(isinstance(trial.value, int) for trial in path)
    assert len(path) <= 14


@pytest.mark.parametrize("target", [0.1, 0.95])
def test_a_target_out_of_reach_has_no_value(target):
    path, found = follow(lambda x: 0.4 + 0.5 * x, UP, target=target)
    assert len(path) == 2
    assert not found.is_reachable
    assert found.value is None
    assert found.held_out == (0.4 if target < 0.4 else 0.9)
    assert f"density {target} is out of reach: threshold from 0.0 to 1.0" in found.explain()
    assert "0.400 to 0.900 on 1 held-out prompts" in found.explain()


def test_an_end_within_the_tolerance_is_a_value():
    _, found = follow(lambda x: 0.4 + 0.5 * x, UP, target=0.398)
    assert found.value == 0.0
    assert found.is_met


def test_a_jump_over_the_target_is_stated():
    path, found = follow(lambda x: 0.2 if x < 0.37 else 0.8, UP, target=0.45)
    assert found.is_reachable
    assert not found.is_met
    assert found.held_out == 0.2
    assert len(path) == 16
    # Between 2 and 3 there is no count.
    path, found = follow(lambda x: 0.2 if x < 3 else 0.8, COUNT, target=0.7)
    assert (found.value, found.is_met) == (3, False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantity": "speed"}, "expected density or coverage"),
        ({"target": [0.2, 0.3]}, r"one number in \(0, 1\).*-m match\.target=0\.2,0\.3"),
        ({"target": True}, "one number"),
        ({"target": 1.0}, r"lie in \(0, 1\), got 1\.0"),
        ({"tolerance": 0}, r"match\.tolerance must lie"),
        ({"num_prompts": 0}, r"match\.num_prompts"),
        ({"max_steps": 1}, r"match\.max_steps"),
    ],
)
def test_wrong_targets_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        MatchConfig(**{"target": 0.3, **settings})


def test_a_list_of_targets_from_the_command_line_says_how_to_sweep(compose_cell):
    with pytest.raises(ConfigError, match=r"-m match\.target=0\.2,0\.3"):
        RunConfig.from_hydra(compose_cell("match=density", "match.target=[0.2,0.3]"))


@pytest.mark.parametrize("name", WITH_KNOB)
def test_every_knob_is_a_parameter_that_works_over_its_range(name):
    knob = METHODS.load(name).knob
    q, k, _ = make_qkv(1, 2, 1, 2000, 32, structure="mixed")
    small = {} if name == "minference" else {"block_size": 32}
    small |= {"segment_size": 64} if name.startswith("pbs") else {}
    small |= {"n_init": 0} if name == "streaming" else {}
    densities = [
        build_method(name, **small, **knob.fixed, **{knob.name: value}).plan(q, k).density().mean()
        for value in (knob.low, knob.high)
    ]
    if not knob.increases_density:
        densities.reverse()
    assert densities[0] < 0.35
    assert densities[1] >= 1
    assert all(hasattr(build_method(name), other) for other in knob.proportional)


def test_only_dense_attention_has_no_knob():
    assert set(METHODS.names) - set(WITH_KNOB) == {"flash"}


def test_a_matched_cell_states_target_knob_and_what_was_reached(run, caplog):
    store = run("method=meanpool", *MATCH, "match.target=0.7", "match.num_prompts=2")
    metrics = store.metrics()
    assert metrics["status"] == "finished"
    match = metrics["match"]
    assert match["quantity"] == "density"
    assert match["target"] == 0.7
    assert match["knob"] == "threshold"
    assert match["is_met"]
    assert abs(match["held_out"] - 0.7) <= 0.005
    assert match["measured"] == metrics["results"]["total"]["density"]
    assert abs(match["measured"] - 0.7) < 0.1
    # The cell's settings are those that ran, and its folder is named by them.
    config = RunConfig.from_dict(json.loads(json.dumps(_config(store))))
    assert config.method["threshold"] == match["value"] != 0.9
    assert config.hash == store.folder.name
    assert metrics["label"] == f"meanpool threshold={match['value']}"
    calibration = json.loads((store.folder / "calibration.json").read_text())
    values = [trial["value"] for trial in calibration["trials"]]
    assert values[:2] == [0.001, 1.0]
    assert match["value"] in values
    measured = {record["sample_id"] for record in store.samples()}
    assert len(calibration["prompts"]) == 2
    assert not measured & set(calibration["prompts"])
    assert f"threshold={match['value']}" in caplog.text


def _config(store):
    import yaml

    return yaml.safe_load(store.config_path.read_text())


def test_the_same_command_again_tries_nothing(run, monkeypatch):
    words = ("method=streaming", *MATCH, "match.target=0.6")
    store = run(*words)
    before = store.metrics_path.stat().st_mtime_ns
    monkeypatch.setattr(matched, "_measure", None)  # would fail if it were called
    assert run(*words).folder == store.folder
    assert store.metrics_path.stat().st_mtime_ns == before
    assert store.metrics()["status"] == "finished"
    method = _config(store)["method"]
    assert method["n_init"] == method["n_local"] // 4


def test_trials_of_two_environments_are_told(run, caplog):
    words = ("method=streaming", *MATCH)
    store = run(*words, "match.target=0.6")
    (path,) = store.folder.parent.glob(".calibration/*/samples.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(len(record["input_digests"]) == len(record["prompts"]) for record in records)
    records[0]["environment"] = "another"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    caplog.clear()
    run(*words, "match.target=0.6")
    assert "were tried in 2 environments; resume=false tries all again" in caplog.text


def test_targets_share_what_was_tried(run, monkeypatch):
    tried = []
    measure = matched._measure

    def count(settings, *arguments):
        tried.append(settings["gamma"])
        return measure(settings, *arguments)

    monkeypatch.setattr(matched, "_measure", count)
    first = run("method=flexprefill", *MATCH, "match.target=0.6", "match.tolerance=0.05")
    second = run("method=flexprefill", *MATCH, "match.target=0.7", "match.tolerance=0.05")
    assert first.folder != second.folder
    assert len(tried) == len(set(tried))


def test_a_target_out_of_reach_is_a_result(command, tmp_path):
    words = ["-m", "debug=fast", "check=false", "bench.lengths=[1024]", "paths.outputs=."]
    words += ["method=flash,minference", "match=density", "match.target=0.1"]
    status, text = command(*words)
    assert status == 0
    assert "unreachable: minference: density 0.1 is out of reach: adaptive_budget from" in text
    assert "density 10: nearest" in text
    (path,) = tmp_path.glob("needle/tiny/minference/*/metrics.json")
    metrics = json.loads(path.read_text())
    assert metrics["status"] == "unreachable"
    assert metrics["match"]["value"] is None
    assert not (path.parent / "samples.jsonl").exists()
    before = path.stat().st_mtime_ns
    assert command(*words)[0] == 0
    assert path.stat().st_mtime_ns == before
    with pytest.warns(UserWarning, match="1 runs without a result.*unreachable"):
        frame = load(tmp_path)
    assert set(frame["method"]) == {"flash"}
    row = load(tmp_path, unfinished=True).set_index("method").loc["minference"]
    assert (row["status"], row["match.target"]) == ("unreachable", 0.1)
    assert row["match.held_out"] > 0.2


def test_dense_attention_runs_as_it_is(run):
    store = run("method=flash", "match=density", "match.target=0.3")
    assert store.folder == run("method=flash").folder
    assert "match" not in store.metrics()


def test_a_knob_set_by_hand_is_refused(run):
    metrics = run("method=meanpool", "method.threshold=0.5", "match=density").metrics()
    assert metrics["status"] == "failed"
    assert "match sets method.threshold of meanpool itself" in metrics["error"]["message"]
    metrics = run("method=minference_authors", "match=density").metrics()
    assert "method.preset=llama31-v2; leave it out" in metrics["error"]["message"]


def test_coverage_is_matched_as_the_bench_measures_it(run):
    words = ("method=pbs", "match=coverage", "match.target=0.97", "bench.lengths=[1024]")
    store = run(*words, "bench.coverage_every=1", "match.lengths=[768]")
    match = store.metrics()["match"]
    assert match["is_met"]
    assert abs(match["held_out"] - 0.97) <= 0.005
    (row,) = make_rows([store.folder])
    assert notes_of([row])[-1] == "held-out: 5 prompts that are not measured"
    assert match["measured"] == store.metrics()["results"]["total"]["coverage"]
    calibration = json.loads((store.folder / "calibration.json").read_text())
    assert all("-768-" in name for name in calibration["prompts"])


def test_held_out_prompts_cannot_be_measured():
    with pytest.raises(ValueError, match="at most 1000000"):
        NeedleBench(num_samples=HELD_OUT_INDEX + 1)


def test_a_match_changes_the_run_but_not_the_samples(compose_cell):
    plain = RunConfig.from_hydra(compose_cell("method=pbs"))
    asked = RunConfig.from_hydra(compose_cell("method=pbs", "match=density"))
    other = RunConfig.from_hydra(compose_cell("method=pbs", "match=density", "match.target=0.4"))
    assert len({plain.hash, asked.hash, other.hash}) == 3
    assert plain.sample_set == asked.sample_set == other.sample_set
    assert RunConfig.from_dict(asked.to_dict()) == asked


@pytest.mark.parametrize("name", ["matched_density", "matched_coverage"])
def test_experiments_compare_all_methods(compose_cell, name):
    cfg = compose_cell(f"experiment={name}", fast=False)
    assert f"match_{cfg.match.quantity}" not in name
    assert cfg.match.quantity == name.removeprefix("matched_")

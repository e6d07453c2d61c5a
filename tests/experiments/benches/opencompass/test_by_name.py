"""``bench=opencompass``: configs that OpenCompass ships, by name, on data made here."""

import json

import pytest

from experiments.benches.opencompass.by_name import (
    OpenCompassDatasets,
    config_files,
    read_configs,
)
from experiments.results import load
from experiments.settings.config import ConfigError

NAME = "babilong_0k_gen"
FAMILIES = (
    "babilong_4k_gen",
    "needlebench_v2_4k",
    "infinitebench",
    "leval",
    "lveval",
    "mrcr_gen",
)


@pytest.fixture
def data(tmp_path):
    """Two tasks of BABILong, of three questions each, in words of the embedded model."""
    root = tmp_path / "data"
    for task in ("qa1", "qa2"):
        folder = root / "data" / "babilong" / "data" / task
        folder.mkdir(parents=True)
        rows = [
            {
                "input": f"The sailor walked to the garden. The baker found the {thing}.",
                "question": "Where is the sailor?",
                "target": "garden",
            }
            for thing in ("amber", "ruby", "opal")
        ]
        (folder / "0k.json").write_text(json.dumps(rows))
    return root


def words(data, *names):
    datasets = ",".join(names or (f"{NAME}/babilong_qa1_0k", f"{NAME}/babilong_qa2_0k"))
    return ("bench=opencompass", f"bench.datasets=[{datasets}]", f"bench.data_dir={data}",
            "bench.max_out_len=4")  # fmt: skip


def test_a_config_runs_by_its_name_continues_and_is_compared_with_dense(run_bench, data):
    dense = run_bench("method=flash", *words(data))
    assert dense.metrics()["status"] == "finished"
    store = run_bench("method=pbs", *words(data))
    metrics = store.metrics()
    assert metrics["status"] == "finished"
    assert [cell["task"] for cell in metrics["results"]["cells"]] == [
        "babilong_qa1_0k",
        "babilong_qa2_0k",
    ]
    assert metrics["results"]["total"]["num_samples"] == 6
    assert metrics["against_dense"]["num_pairs"] == 6
    first = store.samples()[0]
    assert {"sample_id", "score", "completion", "reference", "density", "input_digest"} <= {*first}
    lines = store.samples_path.read_text().splitlines(keepends=True)
    store.samples_path.write_text("".join(lines[:2]))
    store.metrics_path.unlink()
    again = run_bench("method=pbs", *words(data))
    assert [one["completion"] for one in again.samples()] == [
        json.loads(line)["completion"] for line in lines
    ]
    frame = load(store.folder.parents[3])
    assert set(frame["config"]) == {NAME}


def test_missing_data_say_where_opencompass_looks(run_bench, data):
    metrics = run_bench(
        "method=flash", *words(data, f"{NAME}/babilong_qa1_0k", f"{NAME}/babilong_qa3_0k")
    ).metrics()
    assert metrics["status"] == "failed"
    assert metrics["results"]["total"]["num_samples"] == 3  # the others have run
    message = metrics["error"]["message"]
    assert "could not load the data of babilong_qa3_0k" in message
    assert "looks for data/babilong/data in bench.data_dir, then in ~/.cache/opencompass" in message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("babilong_4k_gn", "Did you mean 'babilong_4k_gen'"),
        (f"{NAME}/babilong_qa1_4k", "Did you mean 'babilong_qa1_0k'"),
    ],
)
def test_unknown_names_come_with_the_nearest(run_bench, data, name, message):
    metrics = run_bench("method=flash", *words(data, name)).metrics()
    assert metrics["status"] == "failed"
    assert message in metrics["error"]["message"]


def test_data_sets_that_are_not_generated_are_refused():
    found = [name for name in config_files() if name.startswith("lambada") or "_ppl" in name]
    name = next(name for name in found if "_ppl" in name)
    with pytest.raises(ConfigError, match="bench=opencompass takes data sets whose answers are"):
        read_configs(name)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_long_contexts_are_there_by_name(family):
    names = [name for name in config_files() if name.startswith(family.partition("_")[0])]
    assert names
    readable = family if family in config_files() else names[0]
    assert all(one["abbr"] for one in read_configs(readable))


def test_settings_are_checked():
    for settings, message in (
        ({}, "bench.datasets must name data sets"),
        ({"datasets": ["a", "a"]}, "each once"),
        ({"datasets": ["a"], "fraction": 2.0}, "bench.fraction"),
    ):
        with pytest.raises(ValueError, match=message):
            OpenCompassDatasets(**settings)

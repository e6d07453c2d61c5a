"""Prompts and metrics are OpenCompass's own: our configs against the stock ones."""

import pytest
from mmengine.config import Config

from experiments.benches.opencompass import longbench, longbench_v2, ruler
from experiments.benches.opencompass.harness import STOCK
from tests.experiments.benches.opencompass.conftest import LONGBENCH, LONGBENCH_V2

# What a data set config may differ in: where its rows come from.
SOURCE = {"type", "path"}


def stock(path, key):
    return {config["abbr"]: config for config in Config.fromfile(str(STOCK / path))[key]}


def without(config, keys):
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize("task", longbench.TASKS)
def test_longbench_is_the_stock_config_with_another_source(task):
    theirs = stock("longbench/longbench.py", "longbench_datasets")[f"LongBench_{task}"]
    ours = longbench.make_dataset(task, LONGBENCH / "data" / f"{task}.jsonl")
    assert without(ours, SOURCE) == without(theirs, SOURCE)
    assert ours["infer_cfg"]["inferencer"]["max_out_len"] in (32, 64, 128, 512)


def test_longbench_has_all_tasks_in_opencompass_groups():
    groups = Config.fromfile(str(STOCK.parent / "summarizers" / "groups" / "longbench.py"))
    theirs = [
        {name.removeprefix("LongBench_") for name in group["subsets"]}
        for group in groups["longbench_summary_groups"][:6]
    ]
    assert [set(tasks) for tasks in longbench.CATEGORIES.values()] == theirs
    assert len(longbench.TASKS) == len(set(longbench.TASKS)) == 21


def test_longbench_v2_is_the_stock_config_with_another_source():
    (theirs,) = stock("longbenchv2/longbenchv2_gen.py", "LongBenchv2_datasets").values()
    ours = longbench_v2.make_dataset(LONGBENCH_V2 / "data.json")
    assert without(ours, SOURCE) == without(theirs, SOURCE)


@pytest.mark.parametrize("task", ruler.TASKS)
@pytest.mark.parametrize("length", [4096, 131072])
def test_ruler_is_the_stock_config_with_our_tokenizer_and_files(task, length, tmp_path):
    size = ruler.suffix(length)
    theirs = stock(f"ruler/ruler_{size}_gen.py", "ruler_datasets")[f"ruler_{task}_{size}"]
    ours = ruler.make_dataset(
        task, length=length, num_samples=100, tokenizer="experiments/tiny", folder=tmp_path
    )
    assert ours["tokenizer_model"] == "experiments/tiny"
    differing = {"tokenizer_model", "base_path"} | ({"path"} if task.startswith("qa_") else set())
    assert without(ours, differing) == without(theirs, differing)
    assert ours.get("path", theirs.get("path", "")).endswith(theirs.get("path", "").split("/")[-1])


def test_the_loaders_give_what_the_stock_prompts_and_metrics_use():
    from experiments.benches.opencompass.harness import build_dataset_from_cfg

    for task in longbench.TASKS:
        config = longbench.make_dataset(task, LONGBENCH / "data" / f"{task}.jsonl")
        columns = set(build_dataset_from_cfg(config).test.column_names)
        assert set(config["reader_cfg"]["input_columns"]) <= columns
        assert config["reader_cfg"]["output_column"] in columns
    config = longbench_v2.make_dataset(LONGBENCH_V2 / "data.json")
    rows = build_dataset_from_cfg(config).test
    assert set(config["reader_cfg"]["input_columns"]) <= set(rows.column_names)
    assert len(rows) == 6

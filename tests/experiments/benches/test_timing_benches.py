"""``bench=attention``, ``bench=ttft``, random weights, and the scripts for CPU and GPU."""

import json

import pandas as pd
import pytest
import torch

from experiments.benches.attention import AttentionBench
from experiments.benches.text_files import read_texts
from experiments.benches.ttft import TtftBench, fit_to_length
from experiments.models.load import load_model
from experiments.models.random_weights import ARCHITECTURES, build_random_model, random_ids
from experiments.notes import notes_of
from experiments.report.table import make_rows
from experiments.results import load
from experiments.run.runner import build_bench
from experiments.settings.config import ConfigError, ModelConfig, RunConfig
from experiments.store import RunStore
from experiments.timing.captured_inputs import capture_inputs
from experiments.timing.cost_model import Shape
from experiments.timing.inputs import Cell, draw_inputs
from experiments.timing.prefill_timing import first_token, measure_prefill
from experiments.timing.stopwatch import Effort
from pbs import build_method

CPU = torch.device("cpu")
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 256,
}
FAST_TIMING = (
    "bench.seconds=0.01",
    "bench.min_rounds=1",
    "bench.max_rounds=2",
    "logger.mode=disabled",
    "check=false",
)
OPS = ("bench=attention", "bench.shapes=[2/1/32]", *FAST_TIMING)


@pytest.fixture
def run(compose_cell):
    from experiments.run.runner import run_cell

    def run(*overrides):
        return RunStore(run_cell(compose_cell(*overrides, fast=False)))

    return run


@pytest.fixture(scope="module")
def model():
    return build_random_model(
        ARCHITECTURES / "llama31_8b", dtype=torch.float32, device="cpu", changes=SMALL
    )


def test_the_attention_bench_measures_every_cell(run):
    words = ("bench.lengths=[300,600]", "bench.densities=[0.7,0.9]")
    store = run("method=pbs", *OPS, *words)
    metrics = store.metrics()
    assert metrics["status"] == "finished", metrics.get("error")
    records = store.samples()
    assert [r["sample_id"] for r in records] == [
        f"2/1/32-N{n}-{d}" for n in (300, 600) for d in ("0.7000", "0.9000")
    ]
    cells = metrics["results"]["cells"]
    assert {cell["length"] for cell in cells} == {300, 600}
    times = pd.read_csv(store.folder / "times.csv")
    assert set(times["variant"]) == {"cpu", "pbs"}
    assert (store.folder / "speed_up.png").stat().st_size > 1000
    assert "break-even, tokens" in store.log_path.read_text()


def test_methods_share_the_samples_of_a_timing_run(run):
    dense = run("method=flash", *OPS, "bench.lengths=[300]")
    assert dense.metrics()["results"]["cells"][0]["dense_reason"].startswith("dense method")
    ours = run("method=meanpool", *OPS, "bench.lengths=[300]")
    assert ours.metrics()["sample_set"] == dense.metrics()["sample_set"]


def test_inputs_may_come_from_a_model(run):
    words = ("bench=attention", "bench.structure=model", "bench.lengths=[300,600]", *FAST_TIMING)
    store = run("method=pbs", *words, "bench.text=generated")
    assert store.metrics()["status"] == "finished", store.metrics().get("error")
    assert store.folder.parts[-4:-1] == ("attention", "tiny", "pbs")
    found = [(r["structure"], r["q_heads"], r["head_dim"], r["length"]) for r in store.samples()]
    assert found == [("model", 4, 32, 300), ("model", 4, 32, 600)]
    (question,) = run("method=pbs", *words, "bench.limit=1").samples()
    assert 200 < question["length"] <= 300
    refused = run("method=pbs", *words, "bench.shapes=[8/2/64]").metrics()["error"]["message"]
    assert "the model's own heads, 4/2/32" in refused


def test_what_no_model_takes_part_in_depends_on_none(run):
    tiny = run("method=pbs", *OPS, "bench.lengths=[300]", "model=tiny")
    assert tiny.folder.parts[-3] == "generated_inputs"
    other = run("method=pbs", *OPS, "bench.lengths=[300]", "model=llama31_8b")
    assert other.folder == tiny.folder


def test_sharper_queries_need_fewer_tiles():
    densities = []
    for sharpness in (1.0, 4.0, 16.0):
        ((q, k, _),) = draw_inputs(
            Cell(Shape(4, 2, 32, 4), 3000, torch.float32, CPU, "mixed", sharpness=sharpness)
        )
        densities.append(float(build_method("pbs").plan(q, k).density().mean()))
    assert densities[0] > densities[1] > densities[2]
    assert densities[2] < 0.7 * densities[0]


def test_a_cell_that_cannot_be_is_recorded_and_the_others_go_on(run):
    store = run("method=pbs", *OPS, "bench.lengths=[600]", "bench.densities=[0.01,0.8]")
    metrics = store.metrics()
    assert metrics["status"] == "finished"
    failed, timed = store.samples()
    assert "windows alone" in failed["methods"]["pbs"]["message"]
    assert timed["methods"]["pbs"]["median_ms"] > 0
    assert metrics["results"]["total"]["num_failed"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"structure": "spiral"}, "structure"),
        ({"lengths": []}, "lengths"),
        ({"densities": [0.5], "densities_by_length": True}, "one density per length"),
        ({"densities": [1.5]}, "densities"),
        ({"sharpness": 0.0}, "sharpness"),
        ({"shapes": []}, "shapes"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_settings_of_the_attention_bench_are_explained(settings, message):
    with pytest.raises(ValueError, match=message):
        AttentionBench(**settings)


def test_densities_may_go_with_lengths():
    bench = AttentionBench(lengths=[8, 16], densities=[0.5, 0.4], densities_by_length=True)
    assert bench.grid(["4/2/8"]) == [("4/2/8", 8, 0.5), ("4/2/8", 16, 0.4)]


# ttft


def test_time_to_first_token_of_the_embedded_model(run):
    words = ("bench=ttft", "bench.lengths=[300,600]", "bench.densities=[0.9,0.7]", "model=tiny")
    store = run("method=pbs", *FAST_TIMING, *words)
    metrics = store.metrics()
    assert metrics["status"] == "finished", metrics.get("error")
    record = store.samples()[1]
    pbs = record["methods"]["pbs"]
    assert pbs["floor_ms"] == pytest.approx(sum(pbs["stage_floors_ms"].values()))
    assert pbs["stage_floors_ms"]["linear"] > 0
    assert record["dense"]["cpu"]["floor_ms"] > 0
    assert isinstance(pbs["first_token"], int)
    assert pbs["num_sparse_layers"] == pbs["num_layers"] == 2
    assert pbs["density"] == pytest.approx(0.7, abs=0.05)
    assert pbs["error"] <= pbs["allowed_error"]
    assert set(pbs["stages_ms"]) >= {"order", "selection", "gather", "attention"}
    assert record["dense"]["cpu"]["median_ms"] > 0
    by_length = metrics["results"]["by_length"]
    assert by_length["600"]["prefill_seconds"] == pbs["median_ms"] / 1e3


def test_random_weights_at_a_real_architecture(model):
    config = model.config
    assert config.rope_parameters["rope_type"] == "llama3"
    assert float(model.model.layers[0].mlp.up_proj.weight.detach().std()) == pytest.approx(
        0.02, rel=0.1
    )
    again = build_random_model(
        ARCHITECTURES / "llama31_8b", dtype=torch.float32, device="cpu", changes=SMALL
    )
    ids = random_ids(config.vocab_size, 100, device="cpu")
    assert torch.equal(first_token(model, ids), first_token(again, ids))
    with pytest.raises(ValueError, match="no entry 'num_wheels'"):
        build_random_model(
            ARCHITECTURES / "llama31_8b",
            dtype=torch.float32,
            device="cpu",
            changes={"num_wheels": 4},
        )


def test_the_shipped_architecture_is_llama_31_8b():
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(ARCHITECTURES / "llama31_8b")
    sizes = (config.hidden_size, config.num_hidden_layers, config.intermediate_size)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    assert (sizes, heads) == ((4096, 32, 14336), (32, 8, 128))
    assert (config.vocab_size, config.rope_parameters["rope_theta"]) == (128256, 500000.0)


def test_a_prefill_says_what_ran_and_leaves_the_model_as_it_was(model):
    ids = [random_ids(256, 600, device="cpu", seed=seed) for seed in (0, 1)]
    before = first_token(model, ids[0])
    inner = build_method("minference", vertical_size=30, slash_size=100)
    methods = {"pbs": build_method("pbs"), "minference": inner}
    record = measure_prefill(
        model, ids, methods, ["cpu"], effort=Effort(0.01, 1, 1), density=0.7, takes_stages=False
    )
    assert record["methods"]["pbs"]["speed_up"]["cpu"] > 0
    assert record["methods"]["minference"]["failure"] == "unavailable"
    assert torch.equal(first_token(model, ids[0]), before)


def test_inputs_of_a_layer_can_be_captured(model):
    ids = random_ids(256, 50, device="cpu")
    q, k, v = capture_inputs(model, ids, layer=1)
    assert q.shape == (1, 2, 50, 32)
    assert k.shape == v.shape == (1, 1, 50, 32)
    with pytest.raises(ValueError, match="layer 7"):
        capture_inputs(model, ids, layer=7)


def test_random_weights_are_a_setting_of_the_model(compose_cell):
    from experiments.settings.config import RunConfig

    drawn = RunConfig.from_hydra(compose_cell("model=llama31_8b", "model.weights=random"))
    assert drawn.model_name == "llama31_8b_random"
    assert drawn.model.checkpoint is not None
    pretrained = RunConfig.from_hydra(compose_cell("model=llama31_8b"))
    assert pretrained.hash != drawn.hash
    settings = {
        "path": "nobody/nothing",
        "architecture": "experiments/architectures/llama31_8b",
        "weights": "random",
        "dtype": "float32",
        "device": "cpu",
        "config": SMALL,
    }
    loaded = load_model(ModelConfig(**settings))
    assert loaded.tokenizer is None
    assert loaded.model.config.num_hidden_layers == 2
    with pytest.raises(ConfigError, match="one device"):
        load_model(ModelConfig(**settings, device_map="auto"))
    with pytest.raises(ConfigError, match="pretrained or random"):
        ModelConfig(path="x", weights="lucky")


def test_texts_are_cut_or_repeated(tmp_path):
    assert fit_to_length([1, 2, 3], 7).tolist() == [[1, 2, 3, 1, 2, 3, 1]]
    assert fit_to_length([1, 2, 3], 2).tolist() == [[1, 2]]
    texts = [{"context": "short"}, {"context": "a long one"}]
    as_list, as_lines = tmp_path / "a.json", tmp_path / "b.jsonl"
    as_list.write_text(json.dumps(texts))
    as_lines.write_text("\n".join(map(json.dumps, texts)) + "\n")
    for path in (as_list, as_lines):
        assert read_texts(path, 1) == ["a long one"]
    with pytest.raises(ConfigError, match="no such file"):
        read_texts(tmp_path / "none", 1)
    (tmp_path / "c.json").write_text("[{}]")
    with pytest.raises(ConfigError, match="context"):
        read_texts(tmp_path / "c.json", 1)


def test_a_ttft_run_says_which_texts_were_cut(run, tmp_path):
    path = tmp_path / "texts.json"
    texts = [{"context": "The baker sang at night. " * number} for number in (20, 80)]
    path.write_text(json.dumps(texts))
    words = (f"bench.texts={path}", "bench.lengths=[300,600]", *FAST_TIMING)
    store = run("method=pbs", "bench=ttft", *words)
    facts = [(r["num_truncated"], r["num_repeated"]) for r in store.samples()]
    assert facts == [(1, 1), (0, 2)]
    (row,) = make_rows([store.folder])
    note = "truncated: 1 of 4 prompts (prefill 300: 1 of 2), of whose text a part is missing"
    assert notes_of([row]) == [note]


def test_an_attention_run_says_on_what_its_coverage_was_measured(run):
    store = run("method=pbs", *OPS, "bench.lengths=[300]", "bench.coverage_rows=16")
    (row,) = make_rows([store.folder])
    expected = "coverage: the first inputs of each cell, heads 0, 1, 16 queries of each"
    assert notes_of([row]) == [expected]


def test_wrong_settings_of_the_ttft_bench_are_explained():
    with pytest.raises(ValueError, match="one density per length"):
        TtftBench(lengths=[512, 1024], densities=[0.5])
    with pytest.raises(ValueError, match="num_texts"):
        TtftBench(num_texts=0)


def test_methods_beside_are_timed_in_the_same_cells_under_their_own_names(run):
    beside = "bench.beside={sparse streaming: {name: streaming, n_init: 32, n_local: 128}}"
    store = run("method=pbs", *OPS, "bench.lengths=[300,600]", beside)
    results = store.metrics()["results"]
    assert [cell["is_beside"] for cell in results["cells"]] == [False, True] * 2
    assert results["total"]["num_samples"] == 2
    assert set(results["by_length"]) == {"300", "600"}
    (row,) = make_rows([store.folder])
    assert row["label"] == "pbs"
    frame = load(store.folder.parents[3])
    assert frame["method"].tolist() == ["pbs", "streaming"] * 2
    assert frame["method.n_local"].tolist()[1::2] == [128.0, 128.0]
    assert frame["method.threshold"].isna().tolist() == [False, True] * 2
    assert frame["method.threshold"].notna().tolist() == [True, False] * 2


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ("{pbs: {name: pbs}}", "the run's own method"),
        ("{other: 3}", "a method's settings by label"),
        ("{other: {name: pbss}}", "pbss"),
        ("{other: {name: pbs, tresh: 1}}", "tresh"),
    ],
)
def test_wrong_methods_beside_are_explained(run, beside, message):
    metrics = run("method=pbs", *OPS, f"bench.beside={beside}").metrics()
    assert metrics["status"] == "failed"
    assert message in metrics["error"]["message"]


def test_published_densities_are_those_of_table_5():
    bench = AttentionBench(lengths=[8192, 131072, 262144], densities="published")
    densities = [density for _, _, density in bench.grid(["4/2/32"])]
    assert densities == [1205 / 2080, 114996 / 524800, 114996 / 524800]
    assert TtftBench(lengths=[16384], densities="published").density_of(0) == 4005 / 8256
    for wrong in ("table5", [0.0], [True], 0.5):
        with pytest.raises(ValueError, match=r"bench\.densities must be null, published or"):
            TtftBench(lengths=[16384], densities=wrong)


@pytest.mark.parametrize(
    ("experiment", "small"),
    [("table7", "bench.lengths=[8192]"), ("figure4", "model=tiny bench.lengths=[8192]")],
)
def test_a_gpus_lengths_are_refused_on_a_processor_with_a_smaller_form(
    experiment, small, compose_cell, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = RunConfig.from_hydra(compose_cell(f"experiment={experiment}", fast=False))
    with pytest.raises(ConfigError, match=r"add (.*); or insist with \w+\.device=cpu") as refused:
        build_bench(cfg.bench).prepare(cfg)
    assert f"add {small};" in str(refused.value)
    words = [f"experiment={experiment}", *small.split()]
    smaller = RunConfig.from_hydra(compose_cell(*words, fast=False))
    build_bench(smaller.bench).prepare(smaller)

"""``bench=coverage`` on the embedded model: its records, its texts, resuming, figures, maps."""

import json
import re

import pytest
import torch
from transformers import Qwen2Config

from experiments.benches.coverage.bench import CoverageBench
from experiments.benches.coverage.texts import make_prompts
from experiments.gate.coverage import measure_coverage
from experiments.models.load import load_model
from experiments.notes import notes_of
from experiments.report import run_pictures
from experiments.report.pictures import capture_calls
from experiments.report.pictures import paper as paper_figures
from experiments.report.table import make_rows
from experiments.results import load
from experiments.run.runner import run_cell
from experiments.settings.config import FIGURES, ConfigError, ModelConfig, RunConfig
from experiments.store import RunStore
from experiments.tools import attention_gallery as attention_gallery_command
from pbs import build_method
from tests.experiments.conftest import without_times

QUICK = ("bench=coverage", "check=false", "logger.mode=disabled", "bench.lengths=[512]")


@pytest.fixture(scope="module")
def tiny():
    return load_model(ModelConfig(name="tiny", path="experiments/tiny"))


@pytest.fixture
def _no_pictures(monkeypatch):
    monkeypatch.delitem(run_pictures.OF_A_RUN, "coverage")


@pytest.fixture
def measure(compose_cell, _no_pictures):
    """Run one cell of the bench; returns its folder's store."""

    def measure(*overrides):
        store = RunStore(run_cell(compose_cell(*QUICK, *overrides, fast=False)))
        metrics = store.metrics()
        assert metrics["status"] == "finished", metrics.get("error")
        return store

    return measure


def test_a_run_measures_every_layer_and_head_exactly(measure, tiny):
    records = measure("method=pbs", "bench.values=[0.5,1.0]").samples()
    assert [record["layer"] for record in records] == [0, 1]
    (prompt,) = make_prompts("needle", tiny, lengths=[512], num_prompts=1, seed=0)
    calls = capture_calls(tiny.model, prompt.ids, build_method("flash"), layers=[0, 1])
    for record, call in zip(records, calls, strict=True):
        assert [point["value"] for point in record["points"]] == [0.9, 0.5, 1.0]
        assert [point["is_own"] for point in record["points"]] == [True, False, False]
        for point in record["points"]:
            method = build_method("pbs", threshold=point["value"])
            plan = method.plan(call.q, call.k, scale=call.scale)
            exact = measure_coverage(call.q, call.k, plan, scale=call.scale)[0].tolist()
            assert point["coverage"] == pytest.approx(exact, abs=2e-6)
            assert point["density"] == pytest.approx(plan.density()[0].tolist(), abs=1e-6)


def test_layers_heads_and_rows_are_chosen(measure):
    store = measure(
        "method=pbs", "bench.layers=[1]", "bench.heads=[3,0]", "bench.num_rows=64",
        "bench.num_values=0", "bench.text=generated", "bench.num_prompts=2",
    )  # fmt: skip
    records = store.samples()
    assert [record["sample_id"] for record in records] == [
        "generated-512-0-layer1",
        "generated-512-1-layer1",
    ]
    assert all(record["heads"] == [3, 0] for record in records)
    assert all(len(point["density"]) == 2 for point in records[0]["points"])
    assert len(records[0]["points"]) == 1


def test_a_run_says_what_it_measured_on(measure, tmp_path):
    path = tmp_path / "texts.jsonl"
    texts = ["The baker sang at night. " * number for number in (200, 300)]
    path.write_text("\n".join(json.dumps({"context": text}) for text in texts))
    store = measure(
        "method=pbs", f"bench.text={path}", "bench.num_prompts=2", "bench.heads=[0,3]",
        "bench.num_rows=64", "bench.num_values=0",
    )  # fmt: skip
    (row,) = make_rows([store.folder])
    assert notes_of([row]) == [
        "coverage: 4 of 4 samples (2 prompts), layers 0, 1, heads 0, 3, at most 64 queries of each",
        "truncated: 2 of 2 prompts (512: 2 of 2), of whose text a part is missing",
    ]


def test_a_limit_is_of_each_length(measure):
    store = measure(
        "bench.lengths=[512,600]", "bench.limit=1", "bench.num_prompts=2", "bench.layers=[0]"
    )
    assert [record["length"] for record in store.samples()] == [512, 600]


def test_results_have_a_row_per_length_layer_and_value(measure, tmp_path):
    measure("method=pbs", "bench.values=[0.5,1.0]", "bench.lengths=[512,600]")
    frame = load(tmp_path)
    assert len(frame) == 2 * 2 * 3
    assert set(frame["knob_value"]) == {0.5, 0.9, 1.0}
    assert frame["coverage"].between(0, 1).all()
    full = frame[frame["knob_value"] == 1.0]
    assert full["coverage"].tolist() == pytest.approx([1.0] * 4, abs=1e-6)


def test_dense_attention_keeps_everything(measure):
    total = measure("method=flash").metrics()["results"]["total"]
    assert (total["density"], total["coverage"]) == (1, 1)
    assert len(total["curve"]) == 1


def test_calls_that_would_run_dense_count_as_dense(measure):
    total = measure("method=pbs", "method.dense_below=1000").metrics()["results"]["total"]
    assert {point["coverage"] for point in total["curve"]} == {1}


@pytest.mark.parametrize("method", ["pbs", "minference", "streaming"])
def test_values_are_chosen_for_densities(measure, method):
    store = measure(f"method={method}", "bench.densities=[0.75]", "bench.lengths=[1500]")
    curve = store.metrics()["results"]["total"]["curve"]
    (chosen,) = [point for point in curve if point["target"] is not None]
    assert chosen["target"] == 0.75
    assert chosen["density"] == pytest.approx(0.75, abs=0.06)
    assert chosen["knob_value"] is not None


def test_an_interrupted_run_measures_only_what_is_missing(measure):
    words = ("method=pbs", "bench.values=[0.5]", "bench.num_prompts=2")
    store = measure(*words)
    whole, metrics = store.samples(), store.metrics()
    lines = store.samples_path.read_text().splitlines(keepends=True)
    store.samples_path.write_text(lines[0] + lines[2] + lines[3][:40])
    store.metrics_path.unlink()
    resumed = measure(*words)
    by_id = {record["sample_id"]: record for record in without_times(resumed.samples())}
    assert by_id == {record["sample_id"]: record for record in without_times(whole)}
    assert [record["sample_id"] for record in resumed.samples()][:2] == [
        whole[0]["sample_id"],
        whole[2]["sample_id"],
    ]
    assert resumed.metrics()["results"] == metrics["results"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": []}, "bench.lengths"),
        ({"lengths": [1]}, "at least 2"),
        ({"lengths": [512, 512]}, "each once"),
        ({"num_prompts": 0}, "bench.num_prompts"),
        ({"layers": []}, "bench.layers"),
        ({"heads": [-1]}, "bench.heads"),
        ({"num_values": -1}, "bench.num_values"),
        ({"num_rows": 0}, "bench.num_rows"),
        ({"densities": [0.0]}, r"in \(0, 1\)"),
        ({"densities": [0.5], "values": [0.5]}, "not both"),
    ],
    ids=str,
)
def test_wrong_settings_are_explained(settings, message):
    with pytest.raises(ValueError, match=message):
        CoverageBench(**settings)


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bench.text=no/such/file.txt", "no such file; expected needle, generated"),
        ("bench.values=[1.5]", r"threshold must lie in \(0, 1\]"),
        ("bench.layers=[2]", "bench.layers has 2, the model's are 0 to 1"),
        ("bench.heads=[4]", "bench.heads has 4, the model's are 0 to 3"),
        ("bench.lengths=[99999]", "the model takes 32768 tokens"),
    ],
)
def test_what_does_not_fit_the_model_is_a_recorded_failure(compose_cell, override, message):
    cfg = compose_cell(*QUICK, "method=pbs", override, fast=False)
    error = RunStore(run_cell(cfg)).metrics()["error"]
    assert re.search(message, error["message"])


def test_a_sharded_model_is_refused():
    cfg = RunConfig(model=ModelConfig(path="x", tp=True), method={"name": "pbs"}, bench={})
    with pytest.raises(ConfigError, match="all heads in one process"):
        CoverageBench().prepare(cfg)


def test_plain_text_is_cut_into_pieces_that_begin_like_a_prompt(tiny, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("The old sailor walked near the river in the morning. " * 40)
    prompts = make_prompts(str(path), tiny, lengths=[100], num_prompts=3, seed=0)
    start = tiny.tokenizer("")["input_ids"]
    assert [prompt.name for prompt in prompts] == ["book-100-0", "book-100-1", "book-100-2"]
    ids = torch.cat([prompt.ids for prompt in prompts])
    assert ids.shape == (3, 100)
    assert not any(prompt.is_truncated for prompt in prompts)
    assert ids[:, : len(start)].tolist() == [start] * 3
    whole = tiny.tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
    assert ids[:, len(start) :].flatten().tolist() == whole[: 3 * (100 - len(start))]
    with pytest.raises(ConfigError, match="has 4 prompts of 100 tokens, 9 are needed"):
        make_prompts(str(path), tiny, lengths=[100], num_prompts=9, seed=0)


def test_texts_of_a_json_file_give_a_prompt_each(tiny, tmp_path):
    path = tmp_path / "texts.jsonl"
    texts = [f"The {name} sang at night. " * 30 for name in ("baker", "clerk")]
    path.write_text("\n".join(json.dumps({"context": text}) for text in texts))
    prompts = make_prompts(str(path), tiny, lengths=[64], num_prompts=2, seed=0)
    assert {prompt.ids.shape for prompt in prompts} == {(1, 64)}
    assert not torch.equal(prompts[0].ids, prompts[1].ids)
    assert all(prompt.is_truncated for prompt in prompts)
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"bench\.text="):
        make_prompts(str(path), tiny, lengths=[64], num_prompts=1, seed=0)


FIGURE_RUNS = {
    "figure1": ("method.order=none,last_block,greedy", "bench.values=[0.5,1.0]"),
    "figure5": ("bench.lengths=[512,640]",),
    "figure13": ("bench.values=[0.5,1.0]",),
    "table6": ("bench.values=[0.5,0.9,1.0]",),
}


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize("name", FIGURES)
def test_an_experiment_ends_with_its_figure(command, tmp_path, name):
    words = [word for word in QUICK if not word.startswith("bench=")]
    status, printed = command(
        f"experiment={name}", *words, *FIGURE_RUNS[name], "bench.num_prompts=1"
    )
    assert status == 0, printed
    folder = tmp_path / "outputs" / "coverage" / "tiny"
    assert (folder / f"{name}.png").stat().st_size > 10_000
    assert f"picture: outputs/coverage/tiny/{name}.png" in printed
    assert "accuracy" not in printed
    assert "no dense run" not in printed
    if name == "table6":
        text = (folder / "table6.md").read_text()
        assert "| paper: Llama-3.1-8B, 32K | 70.8% | 24.0% | 5.2% |" in text
        assert (folder / "table6.csv").read_text().count("\n") == 1 + 8


@pytest.mark.usefixtures("_no_pictures")
def test_a_figure_without_its_runs_is_a_warning(command, tmp_path):
    status, printed = command(*QUICK, "method=pbs", "bench.num_values=0", "figure=figure5")
    assert status == 0
    assert "no figure5: figure5 needs finished runs of bench=coverage with method.order" in printed
    assert not list(tmp_path.rglob("figure5.png"))


def test_an_unknown_figure_is_refused(command):
    status, printed = command(*QUICK, "figure=figure9")
    assert status == 1
    assert "figure=figure9: expected one of figure1, figure5, figure13, table6" in printed


def test_figures_change_no_result_and_no_hash(compose_cell):
    plain = RunConfig.from_hydra(compose_cell(*QUICK, fast=False))
    drawn = RunConfig.from_hydra(compose_cell(*QUICK, "figure=figure1", fast=False))
    assert plain.hash == drawn.hash


def test_published_numbers_are_those_of_the_paper():
    assert paper_figures.DENSITIES_UNPERMUTED[8192] == pytest.approx(0.649, abs=5e-4)
    assert paper_figures.DENSITIES[131072] == pytest.approx(0.2191, abs=5e-5)
    assert sum(paper_figures.HEADS.values()) == pytest.approx(1)
    assert paper_figures.DENSITIES.keys() == paper_figures.DENSITIES_UNPERMUTED.keys()


def test_a_run_draws_its_heads_and_maps_and_tracks_them(compose_cell, monkeypatch):
    sent = []
    finish = "experiments.run.tracking.Tracker.finish"
    monkeypatch.setattr(finish, lambda self, *_, pictures=(), **__: sent.extend(pictures))
    overrides = ("method=pbs", "bench.values=[0.5]", "bench.layers=[1]", "bench.heads=[0,2]")
    folder = run_cell(compose_cell(*QUICK, *overrides, fast=False))
    names = ["attention_maps_layer01.png", "coverage_density.png", "heads.png"]
    assert sorted(path.name for path in folder.glob("*.png")) == names
    assert sorted(path.name for path in sent) == names
    assert (folder / "heads.csv").read_text().count("\n") == 1 + 2 * 2

    sent.clear()
    words = [str(folder), "--layers", "0", "--heads", "1", "--tokens", "400"]
    assert attention_gallery_command.main(words) == 0
    assert [path.name for path in sent] == ["attention_maps_layer00.png"]
    assert sent[0].stat().st_size > 10_000


def test_a_gallery_of_what_is_not_there_is_refused(measure, tmp_path, capsys):
    assert attention_gallery_command.main([str(tmp_path)]) == 1
    assert "no folder of a run" in capsys.readouterr().err
    folder = measure("method=pbs", "bench.num_values=0").folder
    assert attention_gallery_command.main([str(folder), "--heads", "7", "--tokens", "400"]) == 1
    assert "head must lie in [0, 4), got 7" in capsys.readouterr().err


def test_special_layers_are_left_out_and_only_they_are_an_error(measure, compose_cell, tmp_path):
    config = Qwen2Config(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        use_sliding_window=True, sliding_window=128, max_window_layers=2,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "model")
    words = (
        *("method=pbs", "model=hf", f"model.path={tmp_path / 'model'}", "model.weights=random"),
        *("bench.text=generated", "bench.num_values=0"),
    )
    assert [record["layer"] for record in measure(*words).samples()] == [0, 1]
    failed = run_cell(compose_cell(*QUICK, *words, "bench.layers=[2]", fast=False))
    message = RunStore(failed).metrics()["error"]["message"]
    assert "none of the layers [2] asks a method, only [0, 1] do" in message


def test_dense_attention_has_no_maps(measure, capsys):
    folder = measure("method=flash").folder
    assert attention_gallery_command.main([str(folder), "--tokens", "400"]) == 0
    assert "computes everything here" in capsys.readouterr().out


def test_a_run_whose_text_changed_is_not_called_finished(measure, tmp_path, caplog):
    text = tmp_path / "text.txt"
    text.write_text("a long story about many things " * 400)
    words = ("method=meanpool", f"bench.text={text}", "bench.num_values=0")
    first = measure(*words)
    text.write_text("another story about other things " * 400)
    caplog.clear()
    second = measure(*words)
    assert second.folder != first.folder
    assert "nothing to do" not in caplog.text
    assert (
        "an earlier run of these settings read other files (bench.text changed since) and stays "
        f"apart: {first.folder}"
    ) in caplog.text
    digests = [{record["input_digest"] for record in store.samples()} for store in (first, second)]
    assert digests[0].isdisjoint(digests[1])
    # Elsewhere, with the same content, it is the same run.
    text.rename(tmp_path / "elsewhere.txt")
    (tmp_path / "other").mkdir()
    moved = (tmp_path / "elsewhere.txt").rename(tmp_path / "other" / "text.txt")
    caplog.clear()
    words = ("method=meanpool", f"bench.text={moved}", "bench.num_values=0")
    assert measure(*words).folder == second.folder
    assert "nothing to do" in caplog.text

"""``bench=likelihood``: zero where nothing is left out, else the direct KL, errors in words."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from experiments.benches import likelihood
from experiments.benches.likelihood import LikelihoodBench, bands, check_head, hidden_states
from experiments.benches.likelihood_math import compare_to_dense, keep_dense
from experiments.benches.texts import held_out_windows, tokens_of, windows_of
from experiments.cached_models import cache_folder
from experiments.models.load import load_model, stretch_positions
from experiments.report.table import make_rows
from experiments.results import load
from experiments.run.runner import run_cell
from experiments.settings.config import ConfigError, ModelConfig, RunConfig
from pbs import build_method
from pbs.patch.huggingface import apply_patch_with_prefill
from tests.methods.cases import CASES

TEXT = Path(__file__).parents[2] / "data" / "harbour.txt"
SIZES = ("bench=likelihood", f"bench.texts=[{TEXT}]", "bench.lengths=[256]", "bench.windows=2")
SMALL = ("method=pbs", "method.block_size=32", "method.segment_size=64", "method.threshold=0.6")


@pytest.fixture(scope="module")
def model():
    return load_model(ModelConfig(path="experiments/tiny"))


@pytest.fixture(scope="module")
def window(model):
    return windows_of(str(TEXT), model.tokenizer, length=256, count=1)[0].ids[None]


def compared(model, ids, method):
    dense = keep_dense(hidden_states(model, ids)[:-1], ids[0, 1:], likelihood.to_logits(model))
    with apply_patch_with_prefill(model.model, method):
        hidden = hidden_states(model, ids)
    return compare_to_dense(dense, hidden[:-1], ids[0, 1:], likelihood.to_logits(model))


def test_a_run_has_metrics_bands_worst_positions_and_low_percentiles(run):
    store = run(*SMALL, *SIZES)
    metrics = store.metrics()
    assert metrics["status"] == "finished"
    records = store.samples()
    assert [record["sample_id"] for record in records] == [
        f"harbour-N256-{record['start']}" for record in records
    ]
    for record in records:
        assert record["kl"] > 0
        assert 0 < record["density"] < 1
        assert record["nll_difference"] == pytest.approx(
            record["nll"] - record["dense_nll"], abs=1e-4
        )
        mean = sum(band["kl"] for band in record["bands"]) / 4
        assert mean == pytest.approx(record["kl"], rel=0.05)  # bands of 63 and 64 positions
        assert record["worst"][0]["kl"] >= record["kl_p99"] >= record["kl"]
        assert {"position", "kl", "token", "next"} == set(record["worst"][0])
        assert record["coverage_p1"] <= record["coverage_p5"] <= record["coverage"] <= 1
    frame = load(store.folder.parents[3])
    assert frame["band"].tolist() == ["all", *(f"{n} of 4" for n in (1, 2, 3, 4))]
    columns = {"kl", "nll_difference", "top1_same", "density", "coverage", "coverage_p1"}
    assert columns <= set(frame.columns)
    assert frame["kl"][0] == pytest.approx(sum(record["kl"] for record in records) / 2)
    assert frame["kl_low"].notna().all()
    (row,) = make_rows([store.folder])
    assert row.get("kl_difference") is None  # it is a difference to dense already
    assert row["kl"] == frame["kl"][0]


@pytest.mark.parametrize("case", [name for name, (_, _, dense) in CASES.items() if dense])
def test_nothing_moves_where_a_method_leaves_nothing_out(model, window, case):
    name, params, dense = CASES[case]
    found = compared(model, window, build_method(name, **{**params, **dense}))
    assert found.kl.max() < 1e-5
    assert found.nll_difference.abs().max() < 1e-4
    assert found.is_same_choice.all()


def test_kl_is_within_its_bound_of_the_direct_one(model, window):
    method = build_method("pbs", block_size=32, segment_size=64, threshold=0.6)
    found = compared(model, window, method)
    with torch.inference_mode():
        dense = model.model(window).logits[0, :-1].double().log_softmax(-1)
        with apply_patch_with_prefill(model.model, method):
            sparse = model.model(window).logits[0, :-1].double().log_softmax(-1)
    direct = (dense.exp() * (dense - sparse)).sum(-1)
    largest = (dense - sparse).abs().amax(-1)
    kept = keep_dense(hidden_states(model, window)[:-1], window[0, 1:], likelihood.to_logits(model))
    bound = kept.log_rest.exp() * largest + 2**-7 * (1 + largest)
    assert direct.max() > 0.01
    assert torch.all((found.kl - direct).abs() <= bound)
    assert float(found.kl.mean()) == pytest.approx(float(direct.mean()), rel=0.02)


def test_dense_predictions_are_computed_once_and_results_continue(run, monkeypatch):
    first = run(*SMALL, *SIZES)
    calls = []
    real = likelihood.hidden_states
    monkeypatch.setattr(likelihood, "hidden_states", lambda *a: calls.append(1) or real(*a))
    run("method=flash", *SIZES, "bench.coverage_rows=0")
    assert len(calls) == 1 + 1 + 2  # the head's check, a warm-up, the two windows: no dense one
    lines = first.samples_path.read_text().splitlines(keepends=True)
    whole = [json.loads(line) for line in lines]
    first.samples_path.write_text(lines[0])
    first.metrics_path.unlink()
    again = run(*SMALL, *SIZES).samples()
    assert [one["kl"] for one in again] == [one["kl"] for one in whole]


def test_other_dense_predictions_are_refused(run):
    store = run("method=flash", *SIZES)
    (kept, *_) = sorted((store.folder.parents[1] / "dense").iterdir())
    kept.write_bytes(b"no such thing")
    metrics = run(*SMALL, *SIZES).metrics()
    assert metrics["status"] == "failed"
    assert "holds no dense log-probabilities" in metrics["error"]["message"]


def test_matched_density_uses_what_is_held_out(run, model):
    words = ("match=density", "match.target=0.5", "match.lengths=[160]", "match.num_prompts=2")
    metrics = run(*SMALL[:3], *SIZES, *words).metrics()
    assert metrics["match"]["num_prompts"] == 2
    ids, first = tokens_of(TEXT, model.tokenizer)
    assert len(first) == 1  # this tokenizer begins every text with a token
    measured = windows_of(str(TEXT), model.tokenizer, length=256, count=3)
    held_out = held_out_windows([str(TEXT)], model.tokenizer, length=160, count=3)
    assert max(one.start + 255 for one in measured) <= min(one.start for one in held_out)
    assert max(one.start + 159 for one in held_out) <= len(ids)
    some = windows_of(str(TEXT), model.tokenizer, length=64, count=4, offset=9)
    assert some[0].start == 9
    assert min(b.start - a.start for a, b in pairwise(some)) >= 63


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\xff\xfe\x00bad", "expected UTF-8"),
        (b"too short " * 30, "2 windows of 256 need 510"),
    ],
    ids=["empty", "blank", "poisoned", "short"],
)
def test_texts_that_cannot_be_measured_are_explained(run, tmp_path, content, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    metrics = run("method=flash", *SIZES, f"bench.texts=[{path}]").metrics()
    assert metrics["status"] == "failed"
    assert message in metrics["error"]["message"]


def test_a_book_that_was_not_fetched_comes_with_its_command(run, monkeypatch, tmp_path):
    monkeypatch.setenv("PBS_CACHE", str(tmp_path / "cache"))
    metrics = run("method=flash", *SIZES, "bench.texts=[debian-handbook]").metrics()
    assert "python -m experiments.tools.texts fetch" in metrics["error"]["message"]


def test_settings_are_checked():
    for settings, message in (
        ({"texts": []}, "bench.texts must name at least one"),
        ({"lengths": [4]}, "at least 8"),
        ({"windows": 0}, "bench.windows"),
        ({"coverage_rows": -1}, "coverage_rows"),
    ):
        with pytest.raises(ValueError, match=message):
            LikelihoodBench(**settings)
    assert [one.stop - one.start for one in bands(10)] == [2, 3, 2, 3]


def test_a_model_that_changes_its_logits_is_refused(model, monkeypatch):
    check_head(model)
    head = model.model.get_output_embeddings()
    monkeypatch.setattr(head, "forward", lambda x, real=head.forward: real(x))
    monkeypatch.setattr(likelihood, "to_logits", lambda model: lambda hidden: 2 * head(hidden))
    with pytest.raises(ConfigError, match="a cap or a scale"):
        check_head(model)


def test_another_file_under_the_same_name_is_another_run(compose_cell, tmp_path):
    path = tmp_path / "text.txt"
    hashes = []
    for content in ("one " * 900, "two " * 900):
        path.write_text(content)
        words = ("method=flash", *SIZES, f"bench.texts=[{path}]")
        hashes.append(RunConfig.from_hydra(compose_cell(*words)).hash)
    assert hashes[0] != hashes[1]
    elsewhere = tmp_path / "sub" / "text.txt"
    elsewhere.parent.mkdir()
    elsewhere.write_text("two " * 900)
    words = ("method=flash", *SIZES, f"bench.texts=[{elsewhere}]")
    assert RunConfig.from_hydra(compose_cell(*words)).hash == hashes[1]


def test_more_positions_are_marked_in_the_models_name(compose_cell):
    cfg = RunConfig.from_hydra(compose_cell("method=flash", "model.rope_factor=4"))
    assert cfg.model_name == "tiny_yarn4"
    plain = RunConfig.from_hydra(compose_cell("method=flash"))
    assert plain.hash != cfg.hash
    assert "rope_factor" not in plain.model_identity
    loaded = load_model(ModelConfig(path="experiments/tiny", rope_factor=4))
    trained = load_model(ModelConfig(path="experiments/tiny"))
    assert loaded.max_length == 4 * trained.max_length
    config = loaded.model.config
    scaling = getattr(config, "rope_parameters", None) or config.rope_scaling
    assert scaling["rope_type"] == "yarn"
    assert scaling["original_max_position_embeddings"] == trained.max_length
    with pytest.raises(ConfigError, match=r"rope_factor must lie in \(1, 64\]"):
        ModelConfig(path="x", rope_factor=1.0)
    with pytest.raises(ConfigError, match="no rotary positions of the plain kind"):
        stretch_positions(config, 2.0, "a model that is stretched already")


@pytest.mark.slow
@pytest.mark.skipif(
    not (cache_folder() / "models" / "smollm2" / "config.json").is_file(),
    reason="needs make model-smollm2",
)
def test_a_real_model_sees_that_random_blocks_do_damage(compose_cell):
    found = {}
    for method in ("flash", "pbs", "random_blocks"):
        words = (f"method={method}", *SIZES[:2], "bench.lengths=[512]", "bench.windows=1")
        words += ("model=smollm2", "check=false")
        words += ("method.density=0.5",) if method == "random_blocks" else ()
        folder = run_cell(compose_cell(*words))
        found[method] = json.loads((folder / "metrics.json").read_text())["results"]["total"]["kl"]
    assert found["flash"] < 1e-5 < found["pbs"] < found["random_blocks"]

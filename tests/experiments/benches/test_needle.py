"""The needle bench: its grid, its records, its metrics."""

import math
from pathlib import Path

import pytest
import torch

from experiments.benches.base import Context
from experiments.benches.needle import (
    NeedleBench,
    answer,
    answer_nll,
    decode,
    encode_sample,
    measure,
    prefill,
)
from experiments.benches.needle_tasks import TASKS, encode, encode_answer, make_sample
from experiments.models.load import load_model
from experiments.report.table import make_rows
from experiments.settings.config import ModelConfig, RunConfig
from pbs import build_method
from pbs.patch.huggingface import apply_patch_with_prefill


@pytest.fixture(scope="module")
def tiny():
    return load_model(ModelConfig(name="tiny", path="experiments/tiny"))


def sample_of(tiny, task="copy", length=512):
    return make_sample(task, length=length, depth=0.5, index=0, seed=0, tokenizer=tiny.tokenizer)


def record_of(name="a", **changes):
    record = {
        "sample_id": name,
        "task": "single",
        "length": 512,
        "correct": True,
        "prefill_seconds": 1.0,
        "density": 0.5,
        "is_truncated": False,
        "sparse_calls": 2,
        "dense_calls": {},
    }
    return record | changes


def test_the_default_grid_has_enough_samples_of_every_kind():
    grid = NeedleBench().grid()
    assert len(grid) == len(set(grid)) >= 60
    assert {task for task, *_ in grid} == set(TASKS)


def test_lengths_are_mixed_so_that_the_time_left_can_be_told():
    lengths = [length for _, length, _, _ in NeedleBench().grid()]
    assert set(lengths[:15]) == {1024, 4096, 8192}


def test_limit_is_per_task_and_marks_the_result():
    bench = NeedleBench(limit=2)
    tasks = [task for task, *_ in bench.grid()]
    assert {task: tasks.count(task) for task in TASKS} == dict.fromkeys(TASKS, 2)
    assert bench.is_partial
    assert not NeedleBench().is_partial


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["singel"]}, "Did you mean 'single'"),
        ({"tasks": []}, "at least one"),
        ({"lengths": [512, 512]}, "each once"),
        ({"depths": [1.5]}, r"in \[0, 1\]"),
        ({"num_samples": 0}, "positive"),
        ({"limit": 0}, "limit"),
        ({"coverage_every": -1}, "coverage_every"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_settings_are_explained(settings, message):
    with pytest.raises(ValueError, match=message):
        NeedleBench(**settings)


@pytest.mark.parametrize("task", ["single", "copy"])
def test_prefill_and_decode_give_what_generate_gives(tiny, task):
    sample = sample_of(tiny, task)
    inputs = encode_sample(tiny, sample)
    logits, cache = prefill(tiny, inputs)
    tokens = decode(tiny, int(logits.argmax()), cache, num_tokens=sample.max_new_tokens)
    expected = tiny.model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=sample.max_new_tokens,
        do_sample=False,
    )
    assert tokens == expected[0, inputs.shape[1] :].tolist()


def test_decode_stops_at_the_end_token(tiny, monkeypatch):
    end = tiny.model.generation_config.eos_token_id
    assert decode(tiny, end, None, num_tokens=9) == [end]
    monkeypatch.setattr(tiny.model.generation_config, "eos_token_id", [7, end])
    assert decode(tiny, 7, None, num_tokens=9) == [7]


def test_a_record_says_what_ran_and_how(tiny):
    sample = sample_of(tiny)
    with apply_patch_with_prefill(tiny.model, build_method("pbs")):
        record = answer(tiny, sample, encode_sample(tiny, sample))
    assert record["sparse_calls"] == 2
    assert record["dense_calls"] == {}
    assert 0 < record["density"] <= 1
    assert len(record["layer_density"]) == 2
    assert record["num_input_tokens"] <= 512
    assert record["prefill_seconds"] > 0
    with apply_patch_with_prefill(tiny.model, build_method("flash")):
        record = answer(tiny, sample, encode_sample(tiny, sample))
    assert record["dense_calls"] == {"dense method (cpu)": 2}
    assert record["density"] == 1


def test_metrics_by_hand():
    records = [
        record_of("a", prefill_seconds=1.0, density=0.2, coverage=0.9),
        record_of("b", prefill_seconds=2.0, density=0.4, correct=False),
        record_of("c", prefill_seconds=3.0, density=0.6, dense_calls={"short": 1}),
    ]
    metrics = measure(records)
    assert metrics["accuracy"] == 2 / 3
    assert metrics["accuracy_low"] < 2 / 3 < metrics["accuracy_high"]
    assert math.isclose(metrics["density"], 0.4)
    assert metrics["coverage"] == 0.9
    assert metrics["prefill_seconds"] == 2.0
    assert metrics["prefill_p20"] is metrics["prefill_p80"] is None  # of three times
    times = measure([*records, *records])
    assert times["prefill_p20"] < 2.0 < times["prefill_p80"]
    assert (metrics["sparse_calls"], metrics["dense_calls"]) == (6, {"short": 1})
    assert metrics["num_truncated"] == 0


def test_metrics_of_nothing_and_of_unmeasured_coverage():
    assert measure([]) == {"num_samples": 0}
    assert measure([record_of()])["coverage"] is None


def test_a_summary_has_every_task_length_and_cell():
    records = [
        record_of("a", task="single", length=512),
        record_of("b", task="copy", length=512, correct=False),
        record_of("c", task="copy", length=1024),
    ]
    summary = NeedleBench().summarise(records)
    assert summary["total"]["num_samples"] == 3
    assert {task: part["accuracy"] for task, part in summary["by_task"].items()} == {
        "single": 1,
        "copy": 0.5,
    }
    assert list(summary["by_length"]) == ["512", "1024"]
    assert [(cell["task"], cell["length"]) for cell in summary["cells"]] == [
        ("single", 512),
        ("copy", 512),
        ("copy", 1024),
    ]
    assert NeedleBench().summarise(records[::-1])["total"] == summary["total"]


def run_covered(tiny, compose_cell, **settings):
    """Records of a bench of prompts of 300 tokens."""
    bench = NeedleBench(lengths=[300], coverage_rows=16, **settings)
    records = []
    context = Context(
        cfg=RunConfig.from_hydra(compose_cell("method=pbs")),
        method=build_method("pbs"),
        model=tiny,
        folder=Path(),
        done=frozenset(),
        announce=lambda _: None,
        add=records.append,
    )
    bench.run(context)
    return bench, records


def test_coverage_of_a_share_meets_every_depth(tiny, compose_cell):
    bench, records = run_covered(tiny, compose_cell, coverage_every=5)
    measured = [record for record in records if "coverage" in record]
    assert len(records) == 25
    assert sorted(record["depth"] for record in measured) == [0, 0.25, 0.5, 0.75, 1]
    assert {record["task"] for record in measured} == set(TASKS)
    total = bench.summarise(records)["total"]
    assert total["num_coverage_samples"] == 5
    assert (total["coverage_layers"], total["coverage_rows"]) == ([0, 1], 16)


def test_coverage_is_of_all_samples_by_default(tiny, compose_cell):
    _, records = run_covered(tiny, compose_cell, tasks=["copy"])
    assert all("coverage" in record for record in records)


def test_held_out_prompts_see_all_pairs_of_task_and_depth(tiny):
    prompts = NeedleBench().held_out(tiny, lengths=[300], num_prompts=25, seed=0)
    pairs = {tuple(name.rsplit("-", 3)[:2]) for name, _ in prompts}
    assert len(pairs) == len(prompts) == 25


def test_the_answers_nll_is_that_of_the_whole_text(tiny):
    sample = sample_of(tiny, "copy")
    inputs = encode_sample(tiny, sample)
    answer = encode_answer(sample, tiny.tokenizer)
    logits, cache = prefill(tiny, inputs)
    decode(tiny, int(logits.argmax()), cache, num_tokens=3)  # is cut off the cache again
    found = answer_nll(tiny, answer, logits, cache, inputs.shape[1])
    whole = torch.cat([inputs, torch.tensor([answer])], dim=1)
    with torch.inference_mode():
        rows = tiny.model(whole).logits[0, inputs.shape[1] - 1 : -1]
    expected = torch.nn.functional.cross_entropy(rows, torch.tensor(answer))
    assert found == pytest.approx(float(expected), abs=1e-4)
    assert answer_nll(tiny, answer, logits, object(), inputs.shape[1]) is None
    assert answer_nll(tiny, answer[:1], logits, object(), inputs.shape[1]) > 0


def test_the_answers_nll_is_compared_with_dense_sample_by_sample(run):
    words = ("bench=needle", "bench.tasks=[single]", "bench.lengths=[512]")
    run("method=flash", *words)
    small = ("method.block_size=32", "method.segment_size=64", "method.threshold=0.3")
    store = run("method=pbs", *small, *words)
    row = make_rows([store.folder])[-1]
    assert row["answer_nll_difference"] > 0
    assert row["answer_nll"] == pytest.approx(store.metrics()["results"]["total"]["answer_nll"])


HARBOUR = Path(__file__).parents[2] / "data" / "harbour.txt"


def test_a_natural_haystack_is_the_texts_own_sentences(tiny, run):
    bench = NeedleBench(haystack=str(HARBOUR))
    sentences = bench.sentences()
    settings = {"depth": 0.5, "seed": 0, "tokenizer": tiny.tokenizer, "haystack": sentences}
    sample = make_sample("single", length=512, index=0, **settings)
    needle = sample.answers[0]
    context = sample.prompt.split("\n\n")[1]
    kept = [sentence for sentence in sentences if sentence in context]
    assert len(kept) > 10
    assert needle in context
    assert make_sample("single", length=512, index=1, **settings).prompt != sample.prompt
    with pytest.raises(ValueError, match="sentences do not fill 4096 tokens"):
        make_sample("single", length=4096, index=0, **settings)
    words = ("bench.lengths=[512]", "bench.tasks=[single]", f"bench.haystack={HARBOUR}")
    metrics = run("method=flash", "bench=needle", *words).metrics()
    assert metrics["status"] == "finished"
    metrics = run("method=flash", "bench=needle", *words[:2], "bench.haystack=nothing").metrics()
    assert "text nothing: no such file" in metrics["error"]["message"]


def test_without_the_chat_template_the_prompt_stands_alone():
    class Chatty:
        chat_template = "{{ messages }}"
        asked = 0

        def __call__(self, texts, **_):
            if isinstance(texts, str):
                return {"input_ids": texts.split()}
            return {"input_ids": [text.split() for text in texts]}

        def apply_chat_template(self, messages, **_):
            self.asked += 1
            return f"<user> {messages[0]['content']} <assistant> "

    tokenizer = Chatty()
    settings = {"length": 200, "depth": 0.5, "index": 0, "seed": 0, "tokenizer": tokenizer}
    assert encode(make_sample("single", **settings), tokenizer)[0] == "<user>"
    tokenizer.asked = 0
    assert encode(make_sample("single", is_chat=False, **settings), tokenizer)[0] == "Read"
    assert tokenizer.asked == 0

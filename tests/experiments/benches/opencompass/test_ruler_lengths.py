"""RULER's prompts fit: chat template, special tokens and the room for the answer are counted."""

import json

import pytest

from experiments.benches.opencompass.ruler import Ruler
from experiments.models.load import resolve_path
from experiments.settings.config import RunConfig

LENGTH = 2048
QUICK_TASKS = ("vt", "fwe", "cwe")  # the others read long lists of words


def make_rows(compose_bench, task, length=LENGTH, **settings):
    from experiments.benches.opencompass.harness import build_dataset_from_cfg

    cfg = RunConfig.from_hydra(compose_bench("bench=ruler"))
    bench = Ruler(tasks=[task], lengths=[length], num_samples=2, **settings)
    bench.prepare_data(cfg)
    return build_dataset_from_cfg(bench.limited_dataset(bench.parts()[0], cfg)).test


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_path("experiments/tiny"))


def encode(tokenizer, text):
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize(
    ("task", "max_out_len"),
    [("niah_single_1", 128), *((task, room) for task in QUICK_TASKS for room in (128, 300))],
)
def test_prompt_template_and_answer_fill_the_length(compose_bench, tokenizer, task, max_out_len):
    rows = make_rows(compose_bench, task, max_out_len=max_out_len)
    totals = [len(encode(tokenizer, row["prompt"])) + max_out_len for row in rows]
    assert max(totals) <= LENGTH
    assert min(totals) > 0.6 * LENGTH


def test_a_short_limit_of_answers_leaves_the_room_that_ruler_asks_for(compose_bench, tokenizer):
    for task, room in (("vt", 30), ("fwe", 50), ("cwe", 120)):
        rows = make_rows(compose_bench, task, max_out_len=2)
        assert max(len(encode(tokenizer, row["prompt"])) + room for row in rows) <= LENGTH


def test_a_long_template_and_its_options_count(compose_bench, tmp_path, tokenizer):
    from experiments.benches.opencompass.ruler_data import CheckedRuler

    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    (tmp_path / "chat_template.jinja").write_text(
        "{% for number in range(length) %}the {% endfor %}{{ messages[0]['content'] }}"
    )
    config.pop("chat_template", None)
    path.write_text(json.dumps(config))
    settings = {"tokenizer_model": str(tmp_path), "max_seq_length": 1024, "num_samples": 1}
    longest = {}
    for length in (0, 400):
        (row,) = CheckedRuler.load(
            "opencompass.datasets.ruler.ruler_vt.RulerVtDataset",
            trust_remote_code=False,
            max_out_len=128,
            chat_options={"length": length},
            **settings,
        )
        longest[length] = len(tokenizer(row["prompt"])["input_ids"])
    assert longest[400] + 400 + 128 <= 1024
    assert longest[0] - longest[400] >= 200


def test_a_model_of_just_this_length_gets_whole_prompts(run_bench):
    words = ["bench=ruler", "bench.tasks=[vt,fwe,cwe]", f"bench.lengths=[{LENGTH}]",
             "bench.num_samples=2", "method=flash", f"model.max_length={LENGTH}"]  # fmt: skip
    store = run_bench(*words)
    assert [record["is_truncated"] for record in store.samples()] == [False] * 6
    results = store.metrics()["results"]
    assert results["total"]["num_truncated"] == 0


def test_a_bench_limit_below_the_length_is_refused():
    with pytest.raises(ValueError, match=r"bench.lengths has 4096, but bench.max_seq_len=2048"):
        Ruler(lengths=[4096], max_seq_len=2048)

"""Our model class: equal to OpenCompass's wrappers, truncation, records."""

import pytest
import torch

from experiments.benches.opencompass.harness import EvaluatedTask, quiet
from experiments.benches.opencompass.longbench import make_dataset
from experiments.benches.opencompass.model import PatchedModel, StockModel
from experiments.models.load import LoadedModel, load_model
from experiments.settings.config import ModelConfig
from pbs import build_method
from pbs.patch.huggingface import apply_patch_with_prefill
from tests.experiments.benches.opencompass.conftest import LONGBENCH

TINY = "experiments/tiny"
QUESTION = "Which animal is the emblem of Brookham?"


@pytest.fixture(scope="module")
def tiny():
    return load_model(ModelConfig(name="tiny", path=TINY))


def infer(model, task, folder, **settings):
    """Predictions of a stock config whose rows come from our file."""
    dataset = make_dataset(task, LONGBENCH / "data" / f"{task}.jsonl")
    dataset["infer_cfg"]["inferencer"]["max_out_len"] = 12
    with quiet(folder / "log"):
        job = EvaluatedTask(dataset, abbr="model", work_dir=folder)
        job.infer(model)
    return job.predictions()


@pytest.mark.parametrize("task", ["hotpotqa", "trec", "vcsum", "lcc"])
def test_dense_predictions_equal_those_of_plain_opencompass(tiny, task, tmp_path, project):
    stock = StockModel(
        path=str(project / TINY),
        model_kwargs={"device_map": "cpu", "torch_dtype": "torch.float"},
        max_seq_len=16384,
    )
    theirs = infer(stock, task, tmp_path / "stock")
    with apply_patch_with_prefill(tiny.model, build_method("flash")):
        ours = infer(PatchedModel(tiny, max_seq_len=16384), task, tmp_path / "ours")
    assert ours == theirs
    assert any(theirs)


def test_without_a_chat_template_the_prompt_is_plain_text(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny.tokenizer, "chat_template", None)
    seen = []
    generate = tiny.model.generate

    def record(*, input_ids, **options):
        seen.append(input_ids)
        return generate(input_ids=input_ids, **options)

    monkeypatch.setattr(tiny.model, "generate", record)
    with apply_patch_with_prefill(tiny.model, build_method("flash")):
        answers = infer(PatchedModel(tiny), "hotpotqa", tmp_path)
    assert len(answers) == len(seen) == 3
    assert seen[0][0, 0] == tiny.tokenizer.bos_token_id
    assert "<user>" not in tiny.tokenizer.decode(seen[0][0])
    assert not any("<" in answer for answer in answers)


def long_prompt(tiny, num_words):
    text = f"Read this . {'the old bridge ' * num_words} {QUESTION}"
    return PatchedModel(tiny, max_seq_len=200)._render(text)


def test_a_prompt_over_the_limit_keeps_role_and_question(tiny, monkeypatch):
    seen = []
    generate = tiny.model.generate

    def record(*, input_ids, **options):
        seen.append(input_ids[0].tolist())
        return generate(input_ids=input_ids, **options)

    monkeypatch.setattr(tiny.model, "generate", record)
    text = long_prompt(tiny, 400)
    with apply_patch_with_prefill(tiny.model, build_method("flash")):
        result = PatchedModel(tiny, max_seq_len=200).answer(text, max_out_len=8)
        fits = PatchedModel(tiny, max_seq_len=4096).answer(text, max_out_len=8)
    whole = tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
    question = tiny.tokenizer(f"{QUESTION}<assistant>", add_special_tokens=False)["input_ids"]
    assert result["is_truncated"] is True
    assert (result["num_prompt_tokens"], result["num_input_tokens"]) == (len(whole), 192)
    assert len(seen[0]) == 192
    assert seen[0][:90] == whole[:90]
    assert seen[0][-len(question) :] == question
    assert seen[0][0] == tiny.tokenizer.bos_token_id
    assert fits["is_truncated"] is False
    assert seen[1] == whole


def test_a_record_says_what_ran(tiny):
    text = long_prompt(tiny, 400)
    with apply_patch_with_prefill(tiny.model, build_method("pbs")):
        sparse = PatchedModel(tiny).answer(text, max_out_len=3)
    with apply_patch_with_prefill(tiny.model, build_method("flash")):
        dense = PatchedModel(tiny).answer(text, max_out_len=3)
    assert (sparse["sparse_calls"], sparse["num_sparse_layers"]) == (2, 2)
    assert 0 < sparse["density"] < 1
    assert len(sparse["layer_density"]) == 2
    assert 0 < sparse["prefill_seconds"] <= sparse["seconds"]
    assert 1 <= sparse["num_output_tokens"] <= 3
    assert (dense["density"], dense["sparse_calls"]) == (1, 0)
    assert sum(dense["dense_calls"].values()) == 2


def test_known_samples_are_not_answered_again(tiny, monkeypatch):
    model, added = PatchedModel(tiny), []
    with apply_patch_with_prefill(tiny.model, build_method("flash")):
        model.begin({}, lambda index, record: added.append((index, record)))
        first, second = model.generate(["one apple", "two apple"], max_out_len=3)
    assert [index for index, _ in added] == [0, 1]
    monkeypatch.setattr(PatchedModel, "answer", lambda *_: pytest.fail("answered again"))
    known = {index: {"sample_id": f"x/{index}", **record} for index, record in added}
    model.begin(known, lambda *_: pytest.fail("added again"))
    assert model.generate(["one apple", "two apple"], max_out_len=3) == [first, second]
    model.begin(known, lambda *_: None)
    with pytest.raises(ValueError, match="sample x/0 was answered for another prompt"):
        model.generate(["three apple"], max_out_len=3)


def test_every_end_token_of_the_model_ends_an_answer(tiny, monkeypatch):
    model = PatchedModel(tiny)
    monkeypatch.setattr(tiny.model.generation_config, "eos_token_id", [7, 9])
    assert model._end_token_ids() == sorted({7, 9, tiny.tokenizer.eos_token_id})
    text = tiny.tokenizer.decode(torch.tensor([20, 9, 21]))
    assert model._decode(torch.tensor([20, 9, 21])) == text.split(tiny.tokenizer.decode([9]))[0]


def test_chat_options_reach_the_template(tiny, monkeypatch):
    template = "{{ 'quiet' if not loud else 'loud' }} {{ messages[0]['content'] }}"
    monkeypatch.setattr(tiny.tokenizer, "chat_template", template)
    assert PatchedModel(tiny)._render("hello") == "quiet hello"
    assert PatchedModel(tiny, chat_options={"loud": True})._render("hello") == "loud hello"


def test_token_lengths_are_those_of_the_whole_prompt(tiny):
    assert isinstance(tiny, LoadedModel)
    model = PatchedModel(tiny, max_seq_len=8)
    assert model.get_token_len("apple " * 50) > 50

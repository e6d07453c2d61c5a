"""Needle tasks: reproducible, within the length, at the depth, and answered by the tiny model."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from experiments.benches.needle_tasks import (
    MARK,
    TASKS,
    NeedleSample,
    encode,
    is_correct,
    make_sample,
    vocabulary,
)

ROOT = Path(__file__).parents[3]
TINY = ROOT / "experiments" / "tiny"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY)


def sample_of(task: str, tokenizer: PreTrainedTokenizerBase, **changes: object) -> NeedleSample:
    settings = {"length": 512, "depth": 0.5, "index": 0, "seed": 0, **changes}
    return make_sample(task, tokenizer=tokenizer, **settings)


@pytest.mark.parametrize("task", TASKS)
def test_equal_arguments_give_equal_samples(task, tokenizer):
    assert sample_of(task, tokenizer) == sample_of(task, tokenizer)


@pytest.mark.parametrize("change", [{"seed": 1}, {"index": 1}, {"depth": 0.25}, {"length": 600}])
def test_every_argument_changes_the_sample(change, tokenizer):
    one, other = sample_of("single", tokenizer), sample_of("single", tokenizer, **change)
    assert one.prompt != other.prompt
    assert one.sample_id != other.sample_id


def test_samples_are_the_same_in_another_process(tokenizer):
    code = (
        "from transformers import AutoTokenizer\n"
        "from experiments.benches.needle_tasks import make_sample\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(TINY)!r})\n"
        "sample = make_sample('multi_key', length=512, depth=0.5, index=0, seed=0,"
        " tokenizer=tokenizer)\n"
        "print(sample.prompt)\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": str(ROOT)}
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert printed.rstrip("\n") == sample_of("multi_key", tokenizer).prompt


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [256, 1000, 8192])
def test_encoded_prompt_fills_the_length_within_one_sentence(task, length, tokenizer):
    for index in range(3):
        sample = sample_of(task, tokenizer, length=length, index=index, depth=index / 2)
        used = len(encode(sample, tokenizer)) + sample.max_new_tokens
        longest_sentence = 20
        assert length - longest_sentence < used <= length


def test_length_bound_holds_for_a_tokenizer_of_characters(tokenizer):
    characters = _character_tokenizer()
    for task in TASKS:
        sample = sample_of(task, characters, length=4000)
        used = len(encode(sample, characters)) + sample.max_new_tokens
        assert 4000 - 110 < used <= 4000


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("depth", [0, 0.0, 0.3, 0.75, 1.0])
def test_asked_needle_stands_at_the_depth(task, depth, tokenizer):
    sample = sample_of(task, tokenizer, length=4096, depth=depth)
    key = re.sub(r" (is|are|=)$", "", sample.answer_prefix).split()[-1].lower()
    sentences = re.split(r"(?<=\.) ", sample.prompt.split("\n\n")[1])
    needles = [i for i, text in enumerate(sentences) if re.search(rf"\b{key}\b", text)]
    place = next(i for i in needles if sample.answers[0] in sentences[i].rstrip(".").split())
    # The other needles of the task stand among the sentences too.
    assert place / (len(sentences) - 1) == pytest.approx(depth, abs=0.02)
    assert sentences[place].startswith(MARK)


@pytest.mark.parametrize("task", TASKS)
def test_right_answer_is_correct_and_others_are_not(task, tokenizer):
    sample = sample_of(task, tokenizer)
    assert is_correct(sample, " ".join(sample.answers))
    assert is_correct(sample, "  " + ", ".join(sample.answers).upper() + ".\nAnd so on")
    assert not is_correct(sample, "")
    assert not is_correct(sample, " ".join(("nothing", *sample.answers)))
    assert not is_correct(sample, " ".join(sample.answers)[:-1])


def test_order_is_free_for_several_values_only(tokenizer):
    values, copied = sample_of("multi_value", tokenizer), sample_of("copy", tokenizer)
    assert is_correct(values, f"{values.answers[1]} and {values.answers[0]}.")
    assert not is_correct(values, f"{values.answers[0]} and {values.answers[0]}.")
    assert not is_correct(copied, " ".join(reversed(copied.answers)))


def test_multi_key_asks_for_one_of_many(tokenizer):
    sample = sample_of("multi_key", tokenizer)
    assert sample.prompt.count("the code of") > sample_of("single", tokenizer).prompt.count(
        "the code of"
    )
    assert len(sample.answers) == 1


@pytest.mark.parametrize("task", TASKS)
def test_tiny_tokenizer_knows_every_word(task, tokenizer):
    for index in range(20):
        sample = sample_of(task, tokenizer, length=1024, index=index)
        answer = tokenizer(" ".join(sample.answers))["input_ids"]
        assert tokenizer.unk_token_id not in encode(sample, tokenizer) + answer


def test_vocabulary_of_the_tokenizer_is_that_of_the_tasks(tokenizer):
    assert set(vocabulary()) <= set(tokenizer.get_vocab())


def test_chat_template_is_used_and_special_tokens_come_once(tokenizer):
    sample = sample_of("single", tokenizer)
    ids = encode(sample, tokenizer)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids[:2]) == "<bos> <user>"
    tail = ids[ids.index(tokenizer.convert_tokens_to_ids("<assistant>")) + 1 :]
    assert tokenizer.decode(tail) == sample.answer_prefix.lower()


def test_tokenizer_without_chat_template_reads_plain_text():
    plain = AutoTokenizer.from_pretrained(TINY)
    plain.chat_template = None
    sample = sample_of("single", plain)
    ids = encode(sample, plain)
    assert ids.count(plain.bos_token_id) == 1
    assert plain.decode(ids).endswith(sample.answer_prefix.lower())
    assert len(ids) + sample.max_new_tokens <= sample.length


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "singel"}, "unknown task 'singel'; expected one of single, multi_key"),
        ({"depth": 1.5}, r"depth must be in \[0, 1\], got 1.5"),
        ({"depth": -0.1}, "depth must be in"),
        ({"depth": float("nan")}, "depth must be in"),
        ({"length": 20}, "length 20 is too small for task 'single'"),
    ],
)
def test_wrong_arguments_raise(change, message, tokenizer):
    settings = {"task": "single", "length": 512, "depth": 0.5, "index": 0, "seed": 0, **change}
    with pytest.raises(ValueError, match=message):
        make_sample(tokenizer=tokenizer, **settings)


def test_sample_is_immutable_but_can_be_replaced(tokenizer):
    sample = sample_of("single", tokenizer)
    with pytest.raises(AttributeError):
        sample.task = "copy"
    assert replace(sample, task="copy").task == "copy"


def test_tiny_model_answers_single_needles(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    for index in range(8):
        sample = sample_of("single", tokenizer, length=1024, index=index, depth=index / 7)
        ids = torch.tensor([encode(sample, tokenizer)])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sample.max_new_tokens,
            do_sample=False,
        )
        completion = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert is_correct(sample, completion), f"depth {sample.depth}: {completion!r}"


def _character_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer with one token a character, so that sentences are long and spaces count."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = {chr(code): code for code in range(128)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(signs, unk_token="?"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?")

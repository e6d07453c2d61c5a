"""RULER's samples, made by OpenCompass, which would wait for ever where they cannot be made.

Its generators try again until a prompt fits, whatever the reason it does not: a length that is too
short, more samples than questions, a broken file. They also run a tokenizer's own Python code, and
count neither the chat template nor an answer longer than they expect. Imports OpenCompass.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from opencompass.datasets.base import BaseDataset
from opencompass.registry import LOAD_DATASET
from transformers import AutoTokenizer

from experiments.benches.opencompass.columns import filled_text, problem, texts
from experiments.benches.opencompass.files import parse_json, read_text
from experiments.benches.opencompass.prompts import render, tokenize

# Attempts in a row at a prompt that fits; of random prompts, some are a little longer.
MAX_ATTEMPTS = 1000
# FWE draws from length / 50 words, of which it asks for three.
FWE_WORDS = 50
SHORTEST_FWE = 4 * FWE_WORDS
# Documents that OpenCompass begins with; a question may not bring more.
MAX_DOCUMENTS = 10


@LOAD_DATASET.register_module()
class CheckedRuler(BaseDataset):
    """A RULER task of OpenCompass with its files and lengths checked first."""

    @staticmethod
    def load(
        stock: Any,
        trust_remote_code: bool,
        max_out_len: int,
        chat_options: Mapping[str, Any],
        **settings: Any,
    ) -> Dataset:
        """Samples with a prompt and its answers.

        Prompt in the chat template, special tokens and the room for the answer have at most
        ``max_seq_length`` tokens. The room is ``max_out_len``, or the stock one if that is more.

        Args:
            stock: OpenCompass's class, or its dotted name.
            trust_remote_code: run the tokenizer's own Python code.
            max_out_len: tokens of an answer at most.
            chat_options: variables of the chat template.
            **settings: what ``stock.load`` takes.

        Raises:
            ValueError: the length is too short for the task, the files are broken or too small.
        """
        if isinstance(stock, str):
            stock = LOAD_DATASET.get(stock)
        is_fwe = "Fwe" in stock.__name__
        needs_haystack = _check_files(settings)
        limit = settings["max_seq_length"]
        room = max(max_out_len, _setting(stock, settings, "tokens_to_generate"))
        shortest = max(SHORTEST_FWE, room + 1) if is_fwe else room + 1
        if limit < shortest:
            raise ValueError(_too_short(limit, shortest))
        tokenizer = AutoTokenizer.from_pretrained(
            settings["tokenizer_model"], trust_remote_code=trust_remote_code
        )

        def encode(text: str) -> list[int]:
            return tokenize(tokenizer, render(tokenizer, text, chat_options))

        guard = _Guard(encode, limit, room, is_strict=is_fwe)
        module = sys.modules[stock.__module__]
        real = module.AutoTokenizer
        module.AutoTokenizer = SimpleNamespace(from_pretrained=lambda *_, **__: guard)
        try:
            rows = stock.load(**_with_room(settings, room, is_fwe=is_fwe))
        finally:
            module.AutoTokenizer = real
        if guard.is_stuck:
            raise ValueError(_too_short(limit, guard.shortest))
        if needs_haystack and guard.longest < limit // 4:
            raise ValueError(
                f"the prompts for bench.lengths={limit} have {guard.longest} tokens: the files in "
                "bench.data_dir are too small; get the whole ones, or choose shorter lengths"
            )
        return rows


class _Guard:
    """A tokenizer that ends a search for a prompt that fits when there is none."""

    def __init__(
        self, encode: Callable[[str], list[int]], limit: int, reserved: int, *, is_strict: bool
    ) -> None:
        self._encode, self._limit, self._reserved = encode, limit, reserved
        self._is_strict = is_strict
        self._num_calls = self._num_misses = 0
        self.is_stuck = False
        self.longest, self.shortest = 0, sys.maxsize

    def encode(self, text: str) -> list[int]:
        """Token ids; none of them once the search has no end, so that it takes the next prompt."""
        ids = self._encode(text)
        total = len(ids) + self._reserved
        self._num_calls += 1
        self.shortest = min(self.shortest, total)
        if total <= self._limit:
            self._num_misses = 0
            self.longest = max(self.longest, total)
            return ids
        self._num_misses += 1
        # Before its search OpenCompass lets an error through, afterwards it tries again.
        if self._num_calls == 1 and not self._is_strict:
            raise ValueError(_too_short(self._limit, total))
        if self._num_misses > MAX_ATTEMPTS:
            self.is_stuck = True
            if self._is_strict:
                raise ValueError(_too_short(self._limit, self.shortest))
            return []
        return ids


def _too_short(limit: int, needed: int) -> str:
    return (
        f"bench.lengths has {limit}, but the shortest prompt of this task takes {needed} tokens "
        "with its answer; choose a longer length"
    )


def _setting(stock: Any, settings: Mapping[str, Any], name: str) -> int:
    return settings.get(name, inspect.signature(stock.load).parameters[name].default)


def _with_room(settings: Mapping[str, Any], room: int, *, is_fwe: bool) -> dict[str, Any]:
    """The settings with which the generator leaves room for the answer."""
    changed = {**settings, "tokens_to_generate": room}
    if is_fwe:  # its search takes the answer for nothing; as many different words as without room
        length = settings["max_seq_length"]
        changed |= {"max_seq_length": length - room, "vocab_size": length // FWE_WORDS}
    return changed


def _check_files(settings: Mapping[str, Any]) -> bool:
    """Check the file that the task reads, if it reads one; says whether it does."""
    if settings.get("type_haystack") == "essay":
        _check_essays(Path(settings["base_path"], settings["file_path"]))
        return True
    if "dataset" not in settings:
        return False
    path = Path(settings["path"])
    content = parse_json(read_text(path), str(path))
    read = _squad_questions if settings["dataset"] == "squad" else _hotpotqa_questions
    try:
        num_questions = read(content)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not {settings['dataset']}'s development set as it is published "
            f"({type(error).__name__}: {error}); download it again"
        ) from error
    if num_questions < settings["num_samples"]:
        raise ValueError(
            f"{path} has {num_questions} questions, bench.num_samples asks for "
            f"{settings['num_samples']}; ask for fewer, or get the whole file"
        )
    return True


def _check_essays(path: Path) -> None:
    lines = read_text(path).removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise ValueError(f"{path}, line {number}: expected an essay a line, got an empty line")
        wrong = problem(parse_json(line, f"{path}, line {number}"), (filled_text("text"),))
        if wrong:
            raise ValueError(f"{path}, line {number}: {wrong}")


def _squad_questions(content: Any) -> int:
    """Questions of SQuAD 2.0 that have an answer."""
    count = 0
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            _expect(filled_text("context").holds(paragraph["context"]), "a context without text")
            for question in paragraph["qas"]:
                if question["is_impossible"]:
                    continue
                _expect(filled_text("question").holds(question["question"]), "an empty question")
                answers = [answer["text"] for answer in question["answers"]]
                _expect(texts("answers").holds(answers), "a question without an answer")
                count += 1
    return count


def _hotpotqa_questions(content: Any) -> int:
    """Questions of HotpotQA."""
    for entry in content:
        for key in ("question", "answer"):
            _expect(filled_text(key).holds(entry[key]), f"an empty {key}")
        documents = entry["context"]
        _expect(0 < len(documents) <= MAX_DOCUMENTS, f"{len(documents)} documents of a question")
        for title, sentences in documents:
            _expect(isinstance(title, str), "a title that is no text")
            _expect(all(isinstance(text, str) for text in sentences), "a sentence that is no text")
    return len(content)


def _expect(holds: bool, wrong: str) -> None:
    if not holds:
        raise ValueError(wrong)

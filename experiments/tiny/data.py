"""What the embedded model is trained on: words, tokenizer, curriculum and batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import tokenizers
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from experiments.benches.needle_tasks import (
    INTRODUCTION,
    MARK,
    NAMES,
    NUM_COPY_WORDS,
    NUM_HOPS,
    NUM_VALUES,
    make_haystack,
    vocabulary,
)

MAX_POSITIONS = 32768


PUNCTUATION_WEIGHT = 0.2


PAD, BOS, EOS, UNK, USER, ASSISTANT = "<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>"


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<assistant>' if message['role'] == 'assistant' else '<user>' }} {{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum.

    Attributes:
        length: tokens of a sequence.
        batch: sequences of a step.
        steps: number of steps at most.
        copy_share: share of the steps that copy random words; the others answer questions.
        lookup_share: share of the steps that look up single values, without questions.
        stretched_share: share of the steps whose positions have random gaps.
        learning_rate: peak rate of the stage; the last eighth of all steps decays to zero.
        resting_weight: weight of ``resting_loss``.
        enough: token accuracy over 50 steps that ends the stage early.
    """

    length: int
    batch: int
    steps: int
    copy_share: float
    lookup_share: float
    stretched_share: float
    learning_rate: float
    resting_weight: float = 0.0
    enough: float = 1.1


CURRICULUM = (
    Stage(64, 64, 800, 1.0, 0.0, 0.0, 3e-3, enough=0.95),
    Stage(128, 32, 600, 1.0, 0.0, 0.0, 3e-3, enough=0.92),
    Stage(128, 32, 200, 0.2, 0.8, 0.5, 3e-3),
    Stage(256, 16, 1000, 0.1, 0.2, 0.5, 3e-3),
    Stage(1024, 4, 800, 0.1, 0.1, 0.5, 2e-3, resting_weight=0.03),
    Stage(4096, 1, 450, 0.1, 0.0, 0.5, 1.5e-3, resting_weight=0.03),
    Stage(16384, 1, 300, 0.1, 0.0, 0.5, 1e-3, resting_weight=0.03),
)


@dataclass(frozen=True)
class Batch:
    """Token ids and position ids ``[Z, N]``; places, targets and weights of the loss ``[Z, M]``."""

    ids: Tensor
    positions: Tensor
    places: Tensor
    targets: Tensor
    weights: Tensor


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer over the vocabulary of the needle tasks."""
    special = [PAD, BOS, EOS, UNK, USER, ASSISTANT]
    words = {word: i for i, word in enumerate([*special, *vocabulary()])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=UNK))
    core.normalizer = tokenizers.normalizers.Lowercase()
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, words[BOS])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_input_names=["input_ids", "attention_mask"],
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=[USER, ASSISTANT],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


class TextSource:
    """Draws token sequences of the training tasks."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.rng = random.Random(seed)
        self.tokenizer = tokenizer
        self.word_id = tokenizer.get_vocab()
        self.eos, self.bos = tokenizer.eos_token_id, tokenizer.bos_token_id
        self.words = range(6, len(tokenizer))
        self.name_ids = {self.word_id[name] for name in NAMES}
        self.mark = self.word_id["note"]
        self.full_stop = self.word_id["."]
        self.haystack = [self.ids(text) for text in make_haystack(20000, random.Random(seed + 1))]

    def ids(self, text: str) -> list[int]:
        """Encode lower-case words separated by spaces; full stops and marks may touch a word."""
        for sign in ".:?=":
            text = text.replace(sign, f" {sign} ")
        return [self.word_id[word] for word in text.lower().split()]

    def copy_row(self, length: int) -> tuple[list[int], dict[int, float]]:
        """Random words, then short passages of them in any order; the loss is on those.

        The passages are short on purpose. In a long one a model may as well match the fifth word
        back, which copies well and finds no needle; here only the last words tell the next.
        """
        rng = self.rng
        # A small vocabulary repeats single words, so that the match needs two of them.
        size = len(self.words) if length <= 64 else rng.choice((24, 48, len(self.words)))
        lead = 1 if size == len(self.words) else 2
        row = [self.bos, *rng.choices(rng.sample(self.words, size), k=length // 2)]
        source_end = len(row)
        weights: dict[int, float] = {}
        longest = rng.choice((4, 4, 8, 16))
        while len(row) < length:
            span = rng.randint(lead + 1, longest)
            start = rng.randint(1, source_end - span)
            weights.update(dict.fromkeys(range(len(row) + lead, len(row) + span), 1.0))
            row += row[start : start + span]
        return row[:length], {place: w for place, w in weights.items() if place < length}

    def lookup_row(self, length: int) -> tuple[list[int], dict[int, float]]:
        """Haystack, needles of single values, then the answers alone: many look-ups at once."""
        rng = self.rng
        names = rng.sample(NAMES, len(NAMES))
        form = "{} =" if rng.random() < 0.3 else "the code of {} is"
        lines: list[list[int]] = []
        replies: list[list[int]] = []
        for _ in range(2 + int(rng.random() ** 2 * length / 16)):
            prefix, value = self.ids(form.format(names.pop())), self.word_id[names.pop()]
            needle = [*self.ids(MARK), *prefix, value, self.full_stop]
            if sum(map(len, lines + replies)) + 2 * len(needle) > length - 1:
                break
            lines.append(needle)
            replies.append([*prefix, value, self.full_stop])
        rng.shuffle(replies)
        tail = [token for reply in replies for token in reply]
        missing = length - 1 - len(tail) - sum(map(len, lines))
        while missing > 0:
            sentence = self.haystack[int(rng.random() * len(self.haystack))][:missing]
            lines.append(sentence)
            missing -= len(sentence)
        rng.shuffle(lines)
        row = [self.bos, *(token for line in lines for token in line)]
        places = accumulate(map(len, replies), initial=len(row))
        values = {place + len(replies[0]) - 2: 1.0 for place in list(places)[:-1]}
        return row + tail, values

    def question_row(self, length: int) -> tuple[list[int], dict[int, float]]:
        """Haystack, needles and a conversation about some of them; the loss is on the answers."""
        rng = self.rng
        names = rng.sample(NAMES, len(NAMES))
        # From one needle, as in `single`, to a context full of marks.
        room = int(length * rng.uniform(0.03, 0.5))
        questions_room = int(length * 0.45)
        codes_only = rng.random() < 0.4
        brief = rng.random() < 0.5
        needles: list[list[int]] = []
        turns: list[list[int]] = []
        while len(names) > 1 + NUM_COPY_WORDS:
            hidden, question, prefix, answer = self._item(names, codes_only=codes_only)
            found = [self.ids(needle) for needle in hidden]
            room -= sum(map(len, found))
            turn = [*self.ids(prefix), -1, *self.ids(answer), -1]
            if not brief or not turns:
                asked = self.ids(f"Question: {question}")
                turn = [self.word_id[USER], *asked, self.word_id[ASSISTANT], *turn]
            if turns and room < 0:
                break
            needles += found
            questions_room -= len(turn)
            if not turns or questions_room > 0:
                turns.append(turn)
        # The first turn carries the question when the answers come in one go.
        if not brief:
            rng.shuffle(turns)
        tail, answers = self._conversation(turns, brief)
        head = [self.bos, self.word_id[USER], *self.ids(INTRODUCTION)]
        missing = length - len(head) - len(tail) - sum(map(len, needles))
        straw: list[list[int]] = []
        while missing > 0:
            sentence = self.haystack[int(rng.random() * len(self.haystack))][:missing]
            straw.append(sentence)
            missing -= len(sentence)
        for needle in needles:
            straw.insert(rng.randint(0, max(len(straw) - 1, 0)), needle)
        row = (head + [token for sentence in straw for token in sentence])[: length - len(tail)]
        return row + tail, {len(row) + place: weight for place, weight in answers.items()}

    def _conversation(
        self, turns: list[list[int]], brief: bool
    ) -> tuple[list[int], dict[int, float]]:
        """Join turns, in which -1 encloses the answer; return tokens and weights of the answers."""
        tail: list[int] = []
        weights: dict[int, float] = {}
        for number, turn in enumerate(turns):
            start = turn.index(-1)
            reply = turn[start + 1 : -1]
            # The user's mark of the first question stands before the haystack.
            tail += turn[:start] if number else turn[1:start]
            if not brief or number + 1 == len(turns):
                reply = [*reply, self.eos]
            for token in reply:
                weights[len(tail)] = 1.0 if token in self.name_ids else PUNCTUATION_WEIGHT
                tail.append(token)
        return tail, weights

    def _item(self, names: list[str], *, codes_only: bool) -> tuple[list[str], str, str, str]:
        """Needles, question, answer prefix and answer of one lookup; takes names off the list."""
        take = [names.pop() for _ in range(1 + NUM_COPY_WORDS)]
        kind = 0.0 if codes_only else self.rng.random()
        if kind < 0.4:
            key, value, *unused = take
            names.extend(unused)
            needles = [f"{MARK} the code of {key} is {value}."]
            return needles, f"What is the code of {key}?", f"The code of {key} is", f"{value}."
        # Two values of one key are the hardest: the second look-up must pass the first over.
        if kind < 0.8:
            key, values = take[0], take[1 : 1 + NUM_VALUES]
            names.extend(take[1 + NUM_VALUES :])
            needles = [f"{MARK} the code of {key} is {value}." for value in values]
            answer = " and ".join(values) + "."
            question = f"What are the two codes of {key}?"
            return needles, question, f"The codes of {key} are", answer
        if kind < 0.9:
            chain = take[: NUM_HOPS + 1]
            names.extend(take[NUM_HOPS + 1 :])
            needles = [f"{MARK} {a} = {b}." for a, b in pairwise(chain)]
            question = f"What is {chain[0]} in the end? Write down every step."
            return needles, question, f"{chain[0]} =", " = ".join(chain[1:]) + "."
        key, words = take[0], " ".join(take[1:])
        needles = [f"{MARK} the list of {key} is {words}."]
        question = f"Repeat the list of {key} word by word."
        return needles, question, f"The list of {key} is", f"{words}."

    def positions(self, row: Sequence[int], stretched: bool) -> list[int]:
        """Position ids with a few random gaps, put after full stops where there are some."""
        if not stretched:
            return list(range(len(row)))
        rng = self.rng
        stops = [i + 1 for i, token in enumerate(row[:-1]) if token == self.full_stop]
        cuts = rng.sample(stops, min(len(stops), 6)) if len(stops) >= 3 else []
        cuts = cuts or [rng.randrange(1, len(row)) for _ in range(2)]
        total = int(rng.random() * (MAX_POSITIONS - len(row)))
        shares = sorted([0.0, *(rng.random() for _ in cuts), 1.0])
        jumps = np.zeros(len(row), dtype=np.int64)
        for cut, low, high in zip(cuts, shares, shares[1:], strict=False):
            jumps[cut] += int((high - low) * total)
        return (np.arange(len(row)) + np.cumsum(jumps)).tolist()

    def batch(self, stage: Stage, *, extra: int, extra_weight: float) -> tuple[str, Batch]:
        """One batch and its kind; ``extra`` random places of questions carry a small loss."""
        kind = self.rng.random()
        if kind < stage.copy_share:
            name, draw, extra = "copy", self.copy_row, 0
        elif kind < stage.copy_share + stage.lookup_share:
            name, draw, extra = "lookup", self.lookup_row, 0
        else:
            name, draw = "questions", self.question_row
        stretched = self.rng.random() < stage.stretched_share
        rows, positions, places, weights = [], [], [], []
        for _ in range(stage.batch):
            row, answers = draw(stage.length)
            rows.append(row)
            positions.append(self.positions(row, stretched))
            rest = self.rng.sample(range(1, len(row)), extra)
            places.append([place - 1 for place in (*answers, *rest)])
            weights.append([*answers.values(), *[extra_weight] * len(rest)])
        width = max(map(len, places))
        padded = torch.tensor([p + [0] * (width - len(p)) for p in places])
        ids = torch.tensor(rows)
        return name, Batch(
            ids=ids,
            positions=torch.tensor(positions),
            places=padded,
            targets=ids.gather(1, padded + 1),
            weights=torch.tensor([w + [0.0] * (width - len(w)) for w in weights]),
        )

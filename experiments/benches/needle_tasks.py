"""Text tasks of ``bench=needle``: seeded, exact-match retrieval for any Hugging Face tokenizer.

A sample is a haystack of plain sentences, a few *needles* ("Note: the code of amber is ruby.")
and a question about them. Its text depends on the seed and on the tokenizer only through the
number of sentences that fit, so a tiny word-level model and a large model read the same language.
The answer prefix ends in the words that stand right before the value in the needle.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

TASKS: tuple[str, ...] = ("single", "multi_key", "multi_value", "variable_tracking", "copy")

NUM_KEYS = 8
NUM_VALUES = 2
NUM_HOPS = 3
NUM_COPY_WORDS = 10

MARK = "Note:"
INTRODUCTION = "Read the text and answer the question at its end."


def _split(text: str, separator: str | None = None) -> tuple[str, ...]:
    """Word lists are written as running text."""
    return tuple(text.split(separator))


NAMES: tuple[str, ...] = _split(
    """
    acorn agate alder almond amber anchor anvil apple apricot aspen badger bamboo banjo barley basil
    basket beaver beetle birch bison bottle bronze bucket butter button cactus camel candle canoe
    carrot castle cedar cello chalk cherry chess cider cinnamon clover cobalt coconut copper coral
    cotton cricket crimson crow crystal cypress daisy diamond dolphin donkey dragon drum eagle
    ebony elm emerald falcon feather fennel fern fiddle finch flint flute fox garlic garnet ginger
    giraffe goose granite grape hammer harp hawk hazel heron honey hornet iris iron ivory ivy
    jade jaguar jasmine kettle kiwi ladder lantern larch laurel lavender lemon leopard lilac lily
    linen lion lizard lobster lotus magnet mango maple marble melon mint mirror moose mustard
    needle nickel nutmeg oak oboe olive onion onyx opal orange orchid otter owl oyster panda
    panther papaya parrot peach peacock pearl pebble pepper piano pigeon pine plum poppy pumpkin
    quartz rabbit radish raven ribbon robin rocket rose ruby saddle saffron salmon sapphire satin
    scarlet shovel silk silver sparrow spider spruce squirrel stork sugar swan teapot thistle tiger
    topaz trumpet tulip turtle velvet vinegar violet violin walnut walrus whale willow wolf zebra
    """
)
_ADJECTIVES = _split(
    "old young quiet busy gentle narrow distant bright empty heavy famous modest clever weary "
    "cheerful patient wooden dusty frozen sunny lonely curious humble careful"
)
_PEOPLE = _split(
    "sailor teacher farmer painter doctor writer baker soldier singer merchant traveller student "
    "gardener captain neighbour carpenter shepherd clerk nurse pilot"
)
_PLACES = _split(
    "river market village harbour garden forest bridge station valley library kitchen mountain "
    "church meadow theatre island tower school street field"
)
_VERBS = _split(
    "walked waited rested wandered stopped worked slept sang talked hurried stood arrived"
)
_ACTIONS = _split(
    "found carried painted dropped bought sold noticed hid repaired admired lost borrowed"
)
_PREPOSITIONS = _split("near behind beyond beside across inside")
_TIMES = _split(
    "in the morning|in the evening|after the storm|before dinner|during the winter|at night|"
    "every summer|for a long time|without a word|once again",
    "|",
)
_WEATHER = _split("cold warm wet dry windy foggy pleasant terrible")

Pick = Callable[[Sequence[Any]], Any]


def _walk(pick: Pick, _names: Sequence[str]) -> str:
    return (
        f"The {pick(_ADJECTIVES)} {pick(_PEOPLE)} {pick(_VERBS)} {pick(_PREPOSITIONS)} "
        f"the {pick(_PLACES)} {pick(_TIMES)}."
    )


def _find(pick: Pick, names: Sequence[str]) -> str:
    return (
        f"The {pick(_PEOPLE)} {pick(_ACTIONS)} the {pick(names)} {pick(_PREPOSITIONS)} "
        f"the {pick(_PLACES)}."
    )


def _meet(pick: Pick, _names: Sequence[str]) -> str:
    return (
        f"A {pick(_PEOPLE)} and a {pick(_ADJECTIVES)} {pick(_PEOPLE)} {pick(_VERBS)} "
        f"{pick(_TIMES)}."
    )


def _trade(pick: Pick, names: Sequence[str]) -> str:
    return (
        f"Later the {pick(_ADJECTIVES)} {pick(_PEOPLE)} {pick(_ACTIONS)} the {pick(names)} and "
        f"the {pick(names)} {pick(_TIMES)}."
    )


def _note(pick: Pick, _names: Sequence[str]) -> str:
    return f"{MARK} it was {pick(_WEATHER)} {pick(_PREPOSITIONS)} the {pick(_PLACES)}."


# Plain notes stand in the haystack too: neither the mark nor a name alone gives a needle away.
_TEMPLATES = (_walk, _walk, _meet, _meet, _find, _find, _trade, _note)


@dataclass(frozen=True)
class NeedleSample:
    """One question over one haystack.

    Attributes:
        task: one of ``TASKS``.
        length: upper bound of encoded prompt plus ``max_new_tokens``, in tokens.
        depth: relative position of the asked needle in the haystack, 0 first and 1 last.
        index: number of the sample among those of equal task, length and depth.
        sample_id: unique name within a seed.
        prompt: context and question.
        answer_prefix: beginning of the answer, written for the model.
        answers: expected words; their order counts except for ``multi_value``.
        max_new_tokens: tokens to generate at most.
        answer_text: what follows the prefix in a right answer.
        is_chat: whether the tokenizer's chat template is written around the prompt, if it has one.
    """

    task: str
    length: int
    depth: float
    index: int
    sample_id: str
    prompt: str
    answer_prefix: str
    answers: tuple[str, ...]
    max_new_tokens: int
    answer_text: str
    is_chat: bool = True


@dataclass(frozen=True)
class Question:
    """The needles of a task and the question about them; the haystack is not part of it.

    Attributes:
        needles: sentences to hide; the first one is put at the asked depth.
        question: text of the question.
        answer_prefix: beginning of the answer.
        answers: expected words.
        answer_text: what follows the prefix in a right answer.
        names: words of ``NAMES`` that the haystack must not mention.
    """

    needles: tuple[str, ...]
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    answer_text: str
    names: tuple[str, ...]


def vocabulary() -> list[str]:
    """Return every word and punctuation mark of all prompts and answers, lower case, sorted."""
    rng = random.Random(0)
    texts = [INTRODUCTION, *NAMES, *_TIMES, *_ADJECTIVES, *_PEOPLE, *_PLACES, *_VERBS, *_ACTIONS]
    texts += [*_PREPOSITIONS, *_WEATHER, *make_haystack(500, rng)]
    for task in TASKS:
        asked = make_question(task, rng)
        texts += [*asked.needles, compose_prompt([], asked.question)]
        texts += [asked.answer_prefix, asked.answer_text]
    return sorted({token for text in texts for token in re.findall(r"\w+|[^\w\s]", text.lower())})


def make_question(task: str, rng: random.Random) -> Question:
    """Draw the needles of ``task`` and the question about them.

    Args:
        task: one of ``TASKS``.
        rng: source of randomness.

    Raises:
        ValueError: ``task`` is unknown.
    """
    if task == "single" or task == "multi_key":
        count = 1 if task == "single" else NUM_KEYS
        names = rng.sample(NAMES, 2 * count)
        keys, values = names[:count], names[count:]
        return Question(
            needles=tuple(
                _code_needle(key, value) for key, value in zip(keys, values, strict=True)
            ),
            question=f"What is the code of {keys[0]}?",
            answer_prefix=f"The code of {keys[0]} is",
            answers=(values[0],),
            answer_text=f" {values[0]}.",
            names=tuple(names),
        )
    if task == "multi_value":
        key, *values = rng.sample(NAMES, 1 + NUM_VALUES)
        return Question(
            needles=tuple(_code_needle(key, value) for value in values),
            question=f"What are the two codes of {key}?",
            answer_prefix=f"The codes of {key} are",
            answers=tuple(values),
            answer_text=" " + " and ".join(values) + ".",
            names=(key, *values),
        )
    if task == "variable_tracking":
        chain = rng.sample(NAMES, NUM_HOPS + 1)
        return Question(
            needles=tuple(f"{MARK} {a} = {b}." for a, b in pairwise(chain)),
            question=f"What is {chain[0]} in the end? Write down every step.",
            answer_prefix=f"{chain[0].capitalize()} =",
            answers=tuple(chain[1:]),
            answer_text=" " + " = ".join(chain[1:]) + ".",
            names=tuple(chain),
        )
    if task == "copy":
        key, *words = rng.sample(NAMES, 1 + NUM_COPY_WORDS)
        return Question(
            needles=(f"{MARK} the list of {key} is {' '.join(words)}.",),
            question=f"Repeat the list of {key} word by word.",
            answer_prefix=f"The list of {key} is",
            answers=tuple(words),
            answer_text=" " + " ".join(words) + ".",
            names=(key, *words),
        )
    raise ValueError(f"unknown task {task!r}; expected one of {', '.join(TASKS)}")


def make_haystack(count: int, rng: random.Random, *, without: tuple[str, ...] = ()) -> list[str]:
    """Draw ``count`` sentences that mention no name of ``without``."""
    names = [name for name in NAMES if name not in without]

    def pick(words: Sequence[str]) -> str:
        # Several times faster than Random.choice; the lists are short, so the bias is nil.
        return words[int(rng.random() * len(words))]

    return [pick(_TEMPLATES)(pick, names) for _ in range(count)]


def _natural_haystack(
    text: Sequence[str], count: int, rng: random.Random, *, without: tuple[str, ...]
) -> list[str]:
    """At most ``count`` sentences from a drawn place on, round the end to the beginning."""
    start = int(rng.random() * len(text))
    turned = [*text[start:], *text[:start]]
    names = re.compile(rf"\b({'|'.join(without)})\b", re.IGNORECASE)
    return [sentence for sentence in turned if not names.search(sentence)][:count]


def compose_prompt(context: list[str], question: str) -> str:
    """Join introduction, context sentences and question into one user message."""
    return f"{INTRODUCTION}\n\n{' '.join(context)}\n\nQuestion: {question}"


def encode(sample: NeedleSample, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of prompt and answer prefix, through the chat template if there is one.

    The template writes its own special tokens, so none are added twice.
    """
    return _encode(sample.prompt, sample.answer_prefix, tokenizer, is_chat=sample.is_chat)


def encode_answer(sample: NeedleSample, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of a right answer, which follow those of :func:`encode`."""
    return _plain_ids(sample.answer_text, tokenizer)


def split_sentences(text: str) -> list[str]:
    """Sentences of running text that can stand in a haystack: of 5 to 80 words."""
    found = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    return [sentence for sentence in found if 5 <= len(sentence.split()) <= 80]


def make_sample(
    task: str,
    *,
    length: int,
    depth: float,
    index: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    haystack: Sequence[str] | None = None,
    is_chat: bool = True,
) -> NeedleSample:
    """Make one sample, the same in every process for equal arguments.

    Args:
        task: one of ``TASKS``.
        length: bound of encoded prompt plus ``max_new_tokens``, in tokens of ``tokenizer``; the
            haystack fills it up to less than one more sentence.
        depth: relative position of the asked needle, in [0, 1]. The other needles of a task are
            spread at random.
        index: number of the sample, for several samples of equal task, length and depth.
        seed: seed of the whole set.
        tokenizer: tokenizer of the model under test.
        haystack: sentences of a natural text, taken in their order from a drawn place on, less
            those that mention a name of the question; default: generated ones.
        is_chat: write the tokenizer's chat template around the prompt, if it has one.

    Raises:
        ValueError: unknown task, depth outside [0, 1], a length that the needles and the question
            alone exceed, or a haystack that is too short to fill it.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; expected one of {', '.join(TASKS)}")
    depth = float(depth)
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth must be in [0, 1], got {depth}")
    name = f"{task}-{length}-d{depth:g}-{index}-s{seed}"
    # Strings seed Random through SHA-512, so the draw does not depend on the process.
    rng = random.Random(f"{seed}|{task}|{length}|{depth!r}|{index}")
    asked = make_question(task, rng)
    places = [depth, *(rng.random() for _ in asked.needles[1:])]
    max_new_tokens = len(_plain_ids(asked.answer_text, tokenizer)) + 4
    budget = length - max_new_tokens

    def encoded_length(sentences: list[str]) -> int:
        prompt = compose_prompt(_hide(asked.needles, places, sentences), asked.question)
        return len(_encode(prompt, asked.answer_prefix, tokenizer, is_chat=is_chat))

    fixed = encoded_length([])
    if fixed > budget:
        raise ValueError(
            f"length {length} is too small for task {task!r}: needles, question and answer alone "
            f"take {fixed + max_new_tokens} tokens"
        )
    # No sentence is shorter than eight tokens in any tokenizer that splits at words.
    wanted = (budget - fixed) // 8 + 1
    if haystack is None:
        sentences = make_haystack(wanted, rng, without=asked.names)
    else:
        sentences = _natural_haystack(haystack, wanted, rng, without=asked.names)
    count = _count_that_fits(sentences, budget, fixed, encoded_length, tokenizer)
    if haystack is not None and count == len(sentences) < wanted:
        raise ValueError(
            f"the haystack's {len(sentences)} sentences do not fill {length} tokens; give a longer "
            "text, or shorter lengths"
        )
    context = _hide(asked.needles, places, sentences[:count])
    return NeedleSample(
        task=task,
        length=length,
        depth=depth,
        index=index,
        sample_id=name,
        prompt=compose_prompt(context, asked.question),
        answer_prefix=asked.answer_prefix,
        answers=asked.answers,
        max_new_tokens=max_new_tokens,
        answer_text=asked.answer_text,
        is_chat=is_chat,
    )


def is_correct(sample: NeedleSample, completion: str) -> bool:
    """Tell whether ``completion`` begins with the expected words.

    Case, white space and punctuation do not count, nor does the word "and". What follows the
    expected number of words is ignored; the order matters except for ``multi_value``.
    """
    words = [word for word in re.findall(r"\w+", completion.lower()) if word != "and"]
    given, expected = words[: len(sample.answers)], list(sample.answers)
    if sample.task == "multi_value":
        return sorted(given) == sorted(expected)
    return given == expected


def _code_needle(key: str, value: str) -> str:
    """One key and one of its values, as a sentence."""
    return f"{MARK} the code of {key} is {value}."


def _hide(needles: Sequence[str], places: Sequence[float], sentences: list[str]) -> list[str]:
    """Insert each needle before the sentence at its relative place."""
    context = list(sentences)
    order = sorted(range(len(needles)), key=lambda i: places[i], reverse=True)
    for i in order:
        context.insert(round(places[i] * len(sentences)), needles[i])
    return context


def _count_that_fits(
    sentences: list[str],
    budget: int,
    fixed: int,
    encoded_length: Callable[[list[str]], int],
    tokenizer: PreTrainedTokenizerBase,
) -> int:
    """Return the largest number of leading sentences whose encoded prompt keeps to the budget.

    The search guesses from the sentences' own lengths, which are exact for most tokenizers, and
    corrects the guess by what the whole prompt took, so it encodes the prompt two or three times.
    """
    rows = tokenizer([" " + sentence for sentence in sentences], add_special_tokens=False)
    ends = [0, *accumulate(len(ids) for ids in rows["input_ids"])]
    fits, too_many, offset = 0, len(sentences) + 1, fixed
    while too_many - fits > 1:
        guess = bisect_right(ends, budget - offset) - 1
        if guess <= fits:
            guess = fits + 1
        guess = min(guess, too_many - 1)
        used = encoded_length(sentences[:guess])
        offset = used - ends[guess]
        if used > budget:
            too_many = guess
            continue
        fits = guess
        if guess < len(sentences) and offset + ends[guess + 1] > budget:
            break
    return fits


def _encode(
    prompt: str, answer_prefix: str, tokenizer: PreTrainedTokenizerBase, *, is_chat: bool
) -> list[int]:
    """Encode a prompt and the beginning of its answer."""
    if tokenizer.chat_template is None or not is_chat:
        return list(tokenizer(f"{prompt}\n{answer_prefix}")["input_ids"])
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return _plain_ids(f"{text}{answer_prefix}", tokenizer)


def _plain_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Encode ``text`` without adding special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])

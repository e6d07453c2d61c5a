"""Prompts of ``bench=coverage``: needle questions, random tokens, or a text file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from experiments.benches.text_files import GENERATED, NEEDLE, read_texts
from experiments.benches.texts import named_text
from experiments.settings.config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.models.load import LoadedModel


class Prompt(NamedTuple):
    """A prompt.

    Attributes:
        name: unique in its run.
        length: in tokens, as it was asked for.
        ids: token ids ``[1, N]``.
        is_truncated: whether it is the beginning of a longer text.
    """

    name: str
    length: int
    ids: Tensor
    is_truncated: bool = False


def check_text(text: str) -> None:
    """Check that there is such a text.

    Raises:
        ConfigError: it is neither a known name nor a file.
    """
    if text not in (NEEDLE, GENERATED) and not named_text(text).is_file():
        raise ConfigError(
            f"bench.text={text}: no such file; expected {NEEDLE}, {GENERATED}, or a file with "
            'plain text or with JSON (lines) that have a text under "context" each, or the name of '
            "a fetched book (python -m experiments.tools.texts list)"
        )


def make_prompts(
    text: str, model: LoadedModel, *, lengths: list[int], num_prompts: int, seed: int
) -> list[Prompt]:
    """Prompts of every length, on the model's device.

    Needle questions have at most ``length`` tokens with their answer, all other prompts exactly
    ``length``. Prompts from plain text are consecutive pieces of it; of JSON each text gives one,
    its beginning.

    Raises:
        ConfigError: no such file, too little text, or a model without the tokenizer it takes.
    """
    check_text(text)
    make = {NEEDLE: _needle, GENERATED: _generated}.get(text)
    if text != GENERATED and model.tokenizer is None:
        raise ConfigError(
            f"bench.text={text} needs a tokenizer, this model has none; use bench.text={GENERATED}"
        )
    prompts = []
    for length in lengths:
        if make is None:
            prompts += _from_file(named_text(text), model, length, num_prompts)
        else:
            prompts += make(model, length, num_prompts, seed)
    return [prompt._replace(ids=prompt.ids.to(model.device)) for prompt in prompts]


def _needle(model: LoadedModel, length: int, count: int, seed: int) -> list[Prompt]:
    """Questions that bench=needle never asks; the same tasks and depths at every length."""
    from experiments.benches.needle import NeedleBench

    bench = NeedleBench(lengths=[length])
    found = bench.held_out(model, lengths=None, num_prompts=count, seed=seed)
    return [Prompt(name, length, ids) for name, ids in found]


def _generated(model: LoadedModel, length: int, count: int, seed: int) -> list[Prompt]:
    from experiments.models.random_weights import random_ids

    vocab = model.model.config.get_text_config().vocab_size
    return [
        Prompt(
            f"generated-{length}-{number}",
            length,
            random_ids(vocab, length, device=model.device, seed=seed + number),
        )
        for number in range(count)
    ]


def _from_file(path: Path, model: LoadedModel, length: int, count: int) -> list[Prompt]:
    import torch

    start = list(model.tokenizer("")["input_ids"])  # the model expects these before any text
    size = length - len(start)
    if path.suffix in (".json", ".jsonl"):
        whole = [_tokens(model, text) for text in read_texts(path, count, setting="bench.text")]
        texts = [(text[:size], len(text) > size) for text in whole]
    else:
        tokens = _tokens(model, path.read_text())
        texts = [(tokens[number * size : (number + 1) * size], False) for number in range(count)]
    enough = [(text, is_cut) for text, is_cut in texts if len(text) == size]
    if len(enough) < count:
        raise ConfigError(
            f"bench.text={path} has {len(enough)} prompts of {length} tokens, {count} are needed; "
            "choose shorter bench.lengths, fewer bench.num_prompts or more text"
        )
    return [
        Prompt(f"{path.stem}-{length}-{number}", length, torch.tensor([[*start, *text]]), is_cut)
        for number, (text, is_cut) in enumerate(enough)
    ]


def _tokens(model: LoadedModel, text: str) -> list[int]:
    return list(model.tokenizer(text, add_special_tokens=False)["input_ids"])

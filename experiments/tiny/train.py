"""Makes ``experiments/tiny``: a two-layer Llama that copies and retrieves, and its tokenizer.

    python -m experiments.tiny.train --device cuda

The lengths grow from 64 to 16384. Exact copying of random words comes first: without it the model
does not learn to look up needles at all. Positions are stretched by random gaps, so that short
sequences already train the distances of long ones. The loss is taken at the answers and at a few
other places only, so the last layer is computed at those queries alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from experiments.benches.needle_tasks import (
    INTRODUCTION,
    MARK,
    NAMES,
    NUM_COPY_WORDS,
    NUM_HOPS,
    NUM_VALUES,
    TASKS,
    encode,
    is_correct,
    make_haystack,
    make_sample,
    vocabulary,
)

logger = logging.getLogger(__name__)

MAX_POSITIONS = 32768
# Samples of each evaluated cell.
EVALUATION: dict[int, dict[str, int]] = {
    **{length: dict.fromkeys(TASKS, 22) for length in (1024, 4096, 8192)},
    **{length: dict.fromkeys(TASKS, 11) for length in (16384, 32768)},
}
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


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained model."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e8},
        initializer_range=0.02,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


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


def logits_at(model: LlamaForCausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the logits ``[Z, M, V]`` and attention ``[Z, Hq, M, N]`` at ``batch.places``.

    Equal to the model's own forward, but the last layer is computed at those queries only and
    position ids may have gaps, which transformers would take for packed sequences.
    """
    core = model.model
    hidden = core.embed_tokens(batch.ids)
    cos, sin = core.rotary_emb(hidden, batch.positions)
    for layer in core.layers[:-1]:
        q, k, v = _project(layer, hidden, hidden, (cos, sin), (cos, sin))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden = _finish(layer, hidden, out)
    layer = core.layers[-1]
    asked = _take(hidden, batch.places)
    at = (
        _take(cos.expand(len(asked), -1, -1), batch.places),
        _take(sin.expand(len(asked), -1, -1), batch.places),
    )
    q, k, v = _project(layer, asked, hidden, at, (cos, sin))
    scores = q @ k.transpose(-1, -2) * layer.self_attn.scaling
    keys = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    hidden_keys = keys > batch.places[:, None, :, None]
    attention = scores.masked_fill(hidden_keys, float("-inf")).softmax(-1)
    hidden = _finish(layer, asked, attention @ v)
    return model.lm_head(core.norm(hidden)), attention


def resting_loss(attention: Tensor, batch: Batch, mark: int) -> Tensor:
    """Return how far the queries without an answer are from resting on the marks.

    Large models park the attention of queries that look for nothing on a few keys, which shows as
    vertical lines in their maps. Two layers trained on answers alone have no reason to, so the
    loss asks for it: minus the logarithm of the share on the marks seen so far, else on the first
    token.
    """
    marks = (batch.ids == mark).float()
    first_mark = torch.where(marks.any(-1), marks.argmax(-1), batch.ids.shape[1])
    none_yet = (batch.places < first_mark[:, None])[:, None, :]
    on_marks = (attention * marks[:, None, None, :]).sum(-1)
    share = torch.where(none_yet, attention[..., 0], on_marks)
    idle = ((batch.weights > 0) & (batch.weights < PUNCTUATION_WEIGHT))[:, None].float()
    count = (idle.sum() * attention.shape[1]).clamp(min=1.0)
    return -(share.clamp(min=1e-6).log() * idle).sum() / count


def _take(x: Tensor, places: Tensor) -> Tensor:
    """Rows ``places [Z, M]`` of ``x [Z, N, C]``."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def _project(
    layer: torch.nn.Module,
    asked: Tensor,
    hidden: Tensor,
    asked_angles: tuple[Tensor, Tensor],
    angles: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries of ``asked`` and keys and values of ``hidden``, ``[Z, Hq, N, D]``."""
    attention = layer.self_attn

    def heads(x: Tensor) -> Tensor:
        return x.view(len(x), x.shape[1], -1, attention.head_dim).transpose(1, 2)

    normed = layer.input_layernorm(hidden)
    q = heads(attention.q_proj(layer.input_layernorm(asked)))
    k, v = heads(attention.k_proj(normed)), heads(attention.v_proj(normed))
    q, _ = apply_rotary_pos_emb(q, q, *asked_angles)
    _, k = apply_rotary_pos_emb(k, k, *angles)
    groups = attention.num_key_value_groups
    return q, k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)


def _finish(layer: torch.nn.Module, hidden: Tensor, out: Tensor) -> Tensor:
    """Output projection, MLP and residuals of a decoder layer."""
    hidden = hidden + layer.self_attn.o_proj(out.transpose(1, 2).flatten(2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def train(
    model: LlamaForCausalLM,
    source: TextSource,
    curriculum: Sequence[Stage],
    *,
    extra: int = 16,
    extra_weight: float = 0.05,
    after_stage: Callable[[], None] | None = None,
) -> list[dict[str, float]]:
    """Train ``model`` in place; return the mean loss and accuracy of every 50 steps."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=0.01)
    total = sum(stage.steps for stage in curriculum)
    curve: list[dict[str, float]] = []
    done = 0
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(3))
    step, start = 0, time.perf_counter()
    for stage in curriculum:
        for stage_step in range(stage.steps):
            step += 1
            warm_up = min(1.0, (stage_step + 1) / 30)
            cool_down = min(1.0, 8 * (total - done - stage_step) / total)
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate * warm_up * cool_down
            kind, batch = source.batch(stage, extra=extra, extra_weight=extra_weight)
            batch = Batch(*(x.to(device) for x in vars(batch).values()))
            logits, attention = logits_at(model, batch)
            losses = F.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none")
            loss = (losses * batch.weights).sum() / batch.weights.sum()
            resting = resting_loss(attention, batch, source.mark)
            loss = loss + stage.resting_weight * resting
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            answers = batch.weights == 1
            right = (logits.argmax(-1) == batch.targets)[answers].float().mean()
            sums[kind] += torch.tensor([losses[answers].mean().item(), right.item(), 1.0])
            if step % 50 == 0 or stage_step + 1 == stage.steps:
                row: dict[str, float] = {"step": step, "length": stage.length}
                seen = {name: (values / values[2]).tolist() for name, values in sums.items()}
                for name, (mean_loss, accuracy, _) in seen.items():
                    row[f"{name}_loss"] = round(mean_loss, 4)
                    row[f"{name}_accuracy"] = round(accuracy, 4)
                row["resting_loss"] = round(resting.item(), 3)
                row["seconds"] = round(time.perf_counter() - start, 1)
                curve.append(row)
                logger.info("%s", row)
                sums.clear()
                if all(accuracy >= stage.enough for _, accuracy, _ in seen.values()):
                    break
        done += stage.steps
        if after_stage is not None:
            after_stage()
    return curve


@torch.no_grad()
def answer(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, ids: list[int], most: int
) -> str:
    """Return the greedy completion of one prompt."""
    out = model.generate(
        torch.tensor([ids], device=model.device),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
        max_new_tokens=most,
        do_sample=False,
    )
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


def evaluate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    task: str,
    length: int,
    count: int,
    seed: int = 2026,
) -> float:
    """Return the share of right answers over ``count`` samples at evenly spaced depths."""
    right = 0
    for index in range(count):
        depth = index % 11 / 10
        sample = make_sample(
            task, length=length, depth=depth, index=index, seed=seed, tokenizer=tokenizer
        )
        completion = answer(model, tokenizer, encode(sample, tokenizer), sample.max_new_tokens)
        right += is_correct(sample, completion)
    return right / count


def attention_concentration(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, length: int, seed: int = 2026
) -> list[list[float]]:
    """Return, per layer and head, the share of far attention on the most attended 1 % of keys.

    Taken over the last 512 queries of a `multi_key` prompt; "far" leaves out the 64 nearest keys.
    """
    sample = make_sample(
        "multi_key", length=length, depth=0.4, index=0, seed=seed, tokenizer=tokenizer
    )
    ids = torch.tensor([encode(sample, tokenizer)], device=model.device)
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(ids, output_attentions=True).attentions
    model.set_attn_implementation(implementation)
    num_keys = ids.shape[1]
    queries = torch.arange(num_keys - 512, num_keys, device=ids.device)
    far = (queries[:, None] - torch.arange(num_keys, device=ids.device)) >= 64
    shares = []
    for layer in maps:
        mass = (layer[0, :, -512:] * far).mean(1)
        top = mass.topk(num_keys // 100).values.sum(-1)
        shares.append([round(share, 3) for share in (top / mass.sum(-1)).tolist()])
    return shares


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model and tokenizer so that transformers 4.57 and 5 both read them the same way."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    # Version 4 reads the RoPE base here and falls back to 10000 without a word.
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    _write_json(folder / "config.json", config)
    # Version 5 writes a class and a list of extra tokens that version 4 does not know.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("backend", None)
    settings.pop("is_local", None)
    extra = settings.pop("extra_special_tokens", None)
    settings["additional_special_tokens"] = extra or [USER, ASSISTANT]
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write_json(folder / "tokenizer_config.json", settings)
    (folder / "model.safetensors").chmod(0o644)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Train, evaluate and write the model; see ``--help``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; results depend on it")
    parser.add_argument("--evaluate-only", action="store_true", help="read the model from --output")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    record_path = options.output / "training.json"
    record: dict[str, object]
    if options.evaluate_only:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.output)
        model = LlamaForCausalLM.from_pretrained(options.output, dtype=torch.float32)
        record = json.loads(record_path.read_text())
    else:
        torch.manual_seed(options.seed)
        tokenizer = build_tokenizer()
        model = build_model(tokenizer).to(options.device)
        start = time.perf_counter()
        curve = train(
            model,
            TextSource(tokenizer, options.seed),
            CURRICULUM,
            after_stage=lambda: save(model, tokenizer, options.output),
        )
        record = {
            "seed": options.seed,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "tokenizers": tokenizers.__version__,
            },
            "device": options.device,
            "threads": options.threads,
            "wall_time_s": round(time.perf_counter() - start),
            "parameters": sum(p.numel() for p in model.parameters()),
            "curriculum": [asdict(stage) for stage in CURRICULUM],
            "curve": curve,
        }
    model.to(options.device).eval()
    _write_json(record_path, record)
    record["attention_top_1_percent"] = attention_concentration(model, tokenizer, length=4096)
    accuracies: dict[str, dict[str, float]] = {task: {} for task in TASKS}
    for length, counts in EVALUATION.items():
        for task, count in counts.items():
            accuracy = evaluate(model, tokenizer, task=task, length=length, count=count)
            accuracies[task][str(length)] = round(accuracy, 4)
            logger.info("%s %d: %.3f of %d", task, length, accuracy, count)
    record["evaluated_samples"] = {str(length): counts for length, counts in EVALUATION.items()}
    record["accuracy"] = accuracies
    _write_json(record_path, record)


if __name__ == "__main__":
    main()

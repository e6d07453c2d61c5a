"""How the embedded model does: right answers by task and length, and where it looks."""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from experiments.benches.needle_tasks import (
    TASKS,
    encode,
    is_correct,
    make_sample,
)

# Samples of each evaluated cell.
EVALUATION: dict[int, dict[str, int]] = {
    **{length: dict.fromkeys(TASKS, 22) for length in (1024, 4096, 8192)},
    **{length: dict.fromkeys(TASKS, 11) for length in (16384, 32768)},
}


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

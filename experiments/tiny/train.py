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
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import tokenizers
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from experiments.benches.needle_tasks import (
    TASKS,
)
from experiments.tiny.data import (
    ASSISTANT,
    CURRICULUM,
    MAX_POSITIONS,
    PUNCTUATION_WEIGHT,
    USER,
    Batch,
    Stage,
    TextSource,
    build_tokenizer,
)
from experiments.tiny.evaluate import EVALUATION, attention_concentration, evaluate

logger = logging.getLogger(__name__)


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

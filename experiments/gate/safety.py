"""The safety gate: is this method right on this model? Seconds, before anything is measured.

Five checks, each a measured number against an allowed one:

- ``dense``: the method at its most permissive setting gives the model's own logits.
- ``kernel``: the output for the method's plans equals masked attention over the pairs they name.
- ``future``: no plan names a key after its query, and changing later tokens changes no logit.
- ``padding``: sequences in a padded batch (left and right) get the logits they get alone.
- ``prefix``: a prompt in two chunks over a cache gets the logits of the model's own attention.

Logits are compared per token, ``|a - b| / |b|``, worst token. What is allowed follows the loaded
model's own sensitivity: the change of its logits when its input embeddings move by one rounding
step, which needs no second copy of the model and holds in any dtype; of a batch, also what the
model's own attention makes of a sequence beside its copy.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.gate.plans import PlanExaminer, recording
from experiments.gate.report import CheckReport, GateError, GateReport
from pbs import AttentionMethod, build_method
from pbs.ops.block_sparse_attention import AS_GIVEN
from pbs.patch.huggingface import apply_patch_with_prefill, get_patch

# Prompt lengths to try, none a multiple of a block, until the method runs sparse.
PROMPT_LENGTHS = (301, 601, 1201, 2401, 4801)
# Allowed: this many times the model's own sensitivity to one rounding step of its input.
FACTOR = 3.0


def run_gate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    method: AttentionMethod,
    *,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> GateReport:
    """Check a method on a loaded model with random prompts.

    Args:
        model: not patched; left as it was found.
        tokenizer: its special tokens are kept out of the prompts.
        method: with the settings that will be measured.
        device: of the inputs; default that of the model's embeddings.
        seed: of the prompts.

    Returns:
        What was measured.

    Raises:
        GateError: a check failed.
        NotImplementedError: the model cannot be patched.
    """
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            return _Gate(model, tokenizer, method, device, seed).run(started)
    finally:
        model.train(was_training)


class _Gate:
    """The checks, sharing one prompt and the model's own logits for it."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        method: AttentionMethod,
        device: torch.device | str | None,
        seed: int,
    ) -> None:
        self.model = model
        self.method = method
        embeddings = model.get_input_embeddings()
        self.device = embeddings.weight.device if device is None else torch.device(device)
        self.generator = torch.Generator().manual_seed(seed)
        special = set() if tokenizer is None else set(tokenizer.all_special_ids)
        self.vocabulary = torch.tensor(
            [token for token in range(embeddings.num_embeddings) if token not in special]
        )
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        densest = method.densest()
        if densest is not None:
            # What eight bits lose is a matter of degree, which the likelihood measures; the kernel
            # is compared with its emulation.
            densest = replace(densest, precision=AS_GIVEN)
        self.densest = build_method("flash") if densest is None else densest
        self.densest_name = (
            "dense attention (the method has no setting that equals it)"
            if densest is None
            else repr(densest)
        )

    def run(self, started: float) -> GateReport:
        """All checks; raises at the first that fails."""
        self.ids, ran_sparse = self._choose_prompt()
        self.own = self._logits(self.ids)
        if not bool(self.own.isfinite().all()):
            raise GateError(
                "finite",
                float("inf"),
                0.0,
                "the model's own logits are not finite before anything is patched: broken weights, "
                "or a dtype too narrow for them (try model.dtype=float32)",
            )
        sensitivity = self._sensitivity()
        self.allowed = FACTOR * sensitivity + torch.finfo(self.own.dtype).eps
        report = GateReport(self.ids.shape[1], ran_sparse, self.densest_name, sensitivity)
        checks = [self._check_dense, self._check_plans, self._check_padding, self._check_prefix]
        for check in checks:
            report.checks.extend(check())
        return GateReport(
            **{**report.__dict__, "seconds": time.perf_counter() - started},
        )

    def _check_dense(self) -> Iterator[CheckReport]:
        begin = time.perf_counter()
        with apply_patch_with_prefill(self.model, self.densest):
            error = _distance(self._logits(self.ids), self.own)
        yield self._judge(
            "dense",
            error,
            begin,
            "at its most permissive setting the method differs from the model's own attention",
        )

    def _check_plans(self) -> Iterator[CheckReport]:
        """Kernel and causality of the plans the method really makes, and of the outputs."""
        begin = time.perf_counter()
        examiner = PlanExaminer()
        with recording(self.method, examiner), apply_patch_with_prefill(self.model, self.method):
            self._logits(self.ids)
        yield self._judge(
            "kernel",
            examiner.kernel_error,
            begin,
            "the kernel's output is not attention over the pairs the plan names",
            allowed=1.0,
            detail=f"{examiner.num_outputs} plans; error / error budget of the worst",
        )
        begin = time.perf_counter()
        yield self._judge(
            "future",
            float(examiner.num_leaks),
            begin,
            "plans name keys after their query, or leave a query without its own key",
            allowed=0.0,
            detail=f"{examiner.num_plans} sparse plans; wrong pairs",
        )
        half = self.ids.shape[1] // 2
        changed = self.ids.clone()
        changed[:, half:] = self._tokens(self.ids.shape[1] - half)
        with apply_patch_with_prefill(self.model, self.densest):
            error = _distance(self._logits(changed)[:, :half], self.own[:, :half])
        yield self._judge(
            "future tokens",
            error,
            begin,
            "changing later tokens changes earlier logits at the most permissive setting",
        )

    def _check_padding(self) -> Iterator[CheckReport]:
        total = self.ids.shape[1]
        short = self.ids[:, : int(total * 0.7)]
        alone = [self.own, self._logits(short)]
        # Products of another shape round differently, with the model's own attention too.
        beside = _distance(self._logits(self.ids.repeat(2, 1))[:1], self.own)
        allowed = max(self.allowed, FACTOR * beside)
        for side in ("left", "right"):
            begin = time.perf_counter()
            ids = self.ids.repeat(2, 1)
            mask = torch.ones_like(ids)
            pad = total - short.shape[1]
            real = slice(pad, total) if side == "left" else slice(0, short.shape[1])
            mask[1] = 0
            mask[1, real] = 1
            ids[1, real] = short[0]
            with apply_patch_with_prefill(self.model, self.densest):
                batch = self._logits(ids, mask=mask)
            error = max(_distance(batch[:1], alone[0]), _distance(batch[1:, real], alone[1]))
            yield self._judge(
                f"padding {side}",
                error,
                begin,
                f"a sequence in a batch padded on the {side} does not get the logits it gets alone",
                allowed=allowed,
            )

    def _check_prefix(self) -> Iterator[CheckReport]:
        begin = time.perf_counter()
        reference = self._two_chunks()
        # The second chunk is to be planned, however short it is.
        planned = replace(self.densest, decode_below=0)
        with apply_patch_with_prefill(self.model, planned):
            error = _distance(self._two_chunks(), reference)
        yield self._judge(
            "prefix",
            error,
            begin,
            "a prompt in two chunks over a cache does not get the logits of the model's attention",
        )

    def _two_chunks(self) -> Tensor:
        split = int(self.ids.shape[1] * 0.6)
        first = self.model(input_ids=self.ids[:, :split], use_cache=True)
        second = self.model(
            input_ids=self.ids[:, split:], past_key_values=first.past_key_values, use_cache=True
        )
        return torch.cat([first.logits, second.logits], dim=1)

    def _choose_prompt(self) -> tuple[Tensor, bool]:
        """The shortest prompt for which the method runs sparse, else the longest there is."""
        config = self.model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None) or max(PROMPT_LENGTHS)
        lengths = [n for n in PROMPT_LENGTHS if n <= limit] or [limit]
        if isinstance(self.method, type(build_method("flash"))):
            return self._tokens(lengths[0]), False
        tokens = self._tokens(lengths[-1])
        with apply_patch_with_prefill(self.model, self.method):
            patch = get_patch(self.model)
            for length in lengths:
                self._logits(tokens[:, :length])
                if patch.report().num_sparse_layers:
                    return tokens[:, :length], True
        return tokens[:, : lengths[0]], False

    def _sensitivity(self) -> float:
        """Change of the logits when the input embeddings move by one rounding step."""
        embedded = self.model.get_input_embeddings()(self.ids)
        eps = torch.finfo(embedded.dtype).eps
        worst = 0.0
        for _ in range(2):
            signs = torch.randint(0, 2, embedded.shape, generator=self.generator) * 2 - 1
            moved = embedded.double().cpu() * (1 + eps * signs)
            moved = moved.to(device=embedded.device, dtype=embedded.dtype)
            logits = self.model(inputs_embeds=moved, use_cache=False).logits
            worst = max(worst, _distance(logits, self.own))
        return worst

    def _logits(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        inputs: dict[str, Tensor] = {"input_ids": ids}
        if mask is not None:
            inputs["attention_mask"] = mask
            if self.takes_positions:
                inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
        logits: Tensor = self.model(**inputs, use_cache=False).logits
        return logits

    def _tokens(self, count: int) -> Tensor:
        index = torch.randint(0, len(self.vocabulary), (1, count), generator=self.generator)
        return self.vocabulary[index].to(self.device)

    def _judge(
        self,
        name: str,
        measured: float,
        begin: float,
        meaning: str,
        *,
        allowed: float | None = None,
        detail: str = "",
    ) -> CheckReport:
        allowed = self.allowed if allowed is None else allowed
        if not measured <= allowed:  # also true for NaN
            raise GateError(name, measured, allowed, meaning)
        return CheckReport(name, measured, allowed, time.perf_counter() - begin, detail)


def _distance(logits: Tensor, reference: Tensor) -> float:
    """Worst token's |logits - reference| / |reference|; infinite for NaN."""
    worst = 0.0
    for rows, reference_rows in zip(logits.split(256, dim=1), reference.split(256, 1), strict=True):
        expected = reference_rows.double()
        error = (rows.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
        worst = max(worst, float(error.nan_to_num(nan=float("inf")).max()))
    return worst

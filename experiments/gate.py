"""The safety gate: is this method right on this model? Seconds, before anything is measured.

Five checks, each a measured number against an allowed one:

- ``dense``: the method at its most permissive setting gives the model's own logits.
- ``kernel``: the output for the method's plans equals masked attention over the pairs they name.
- ``future``: no plan names a key after its query, and changing later tokens changes no logit.
- ``padding``: sequences in a padded batch (left and right) get the logits they get alone.
- ``prefix``: a prompt in two chunks over a cache gets the logits of the model's own attention.

Logits are compared per token, ``|a - b| / |b|``, worst token. What is allowed follows the loaded
model's own sensitivity: the change of its logits when its input embeddings move by one rounding
step, which needs no second copy of the model and holds in any dtype.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pbs import AttentionMethod, CallRecord, block_sparse_attention, build_method
from pbs.patch.huggingface import apply_patch_with_prefill, get_patch

# Prompt lengths to try, none a multiple of a block, until the method runs sparse.
PROMPT_LENGTHS = (301, 601, 1201, 2401, 4801)
# Allowed: this many times the model's own sensitivity to one rounding step of its input.
FACTOR = 3.0
# Largest token mask (heads x N x N) to write out; longer plans are only validated.
MAX_MASK_ELEMENTS = 1 << 28
# Layers whose plans are examined: the first and the last few that run sparse.
NUM_PLANS = 4


class GateError(RuntimeError):
    """A check failed: the method, its kernel or the plug-in is wrong on this model.

    Attributes:
        check: the check that failed.
        measured: its number.
        allowed: the largest number that would have passed.
    """

    def __init__(self, check: str, measured: float, allowed: float, meaning: str) -> None:
        self.check, self.measured, self.allowed = check, measured, allowed
        super().__init__(
            f"safety gate: check {check!r} failed: {meaning}: measured {measured:.3g}, allowed "
            f"{allowed:.3g}. Do not trust results of this combination; try backend='reference', "
            "the method 'flash' and attn_implementation='sdpa' to find the part that is wrong"
        )


@dataclass(frozen=True)
class CheckReport:
    """One check: passed if ``measured <= allowed``."""

    name: str
    measured: float
    allowed: float
    seconds: float
    detail: str = ""


@dataclass(frozen=True)
class GateReport:
    """A gate that was passed.

    Attributes:
        num_tokens: length of the prompt.
        ran_sparse: whether the method ran sparse at that length; if not, ``kernel`` and ``future``
            saw no sparse plan.
        densest: what stood for the method at its most permissive setting.
        sensitivity: change of the logits when the input moves by one rounding step.
        checks: in the order they ran.
        seconds: all together.
    """

    num_tokens: int
    ran_sparse: bool
    densest: str
    sensitivity: float
    checks: list[CheckReport] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Always true: :func:`run_gate` raises otherwise."""
        return all(check.measured <= check.allowed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {**asdict(self), "passed": self.passed}


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
        examiner = _PlanExaminer()
        with _recording(self.method, examiner), apply_patch_with_prefill(self.model, self.method):
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
            )

    def _check_prefix(self) -> Iterator[CheckReport]:
        begin = time.perf_counter()
        reference = self._two_chunks()
        with apply_patch_with_prefill(self.model, self.densest):
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


class _PlanExaminer:
    """Looks at sparse calls as they happen and keeps only numbers."""

    def __init__(self) -> None:
        self.num_plans = 0
        self.num_outputs = 0
        self.num_leaks = 0
        self.kernel_error = 0.0

    def examine(self, record: CallRecord, backend: str) -> None:
        """Causality of the plan; output of the kernel for it, with the keys as values."""
        plan, q, k = record.plan, record.q, record.k
        if plan.is_dense or self.num_plans >= NUM_PLANS:
            return
        self.num_plans += 1
        try:
            plan.validate()
        except ValueError as error:
            raise GateError("future", 1.0, 0.0, str(error)) from error
        if q.shape[1] * q.shape[2] * k.shape[2] > MAX_MASK_ELEMENTS:
            return
        seen = plan.token_mask()
        positions = torch.arange(q.shape[2], device=q.device) + plan.grid.offset
        future = torch.arange(k.shape[2], device=q.device) > positions[:, None]
        self.num_leaks += int((seen & future).sum())
        own = seen.gather(3, positions[:, None].expand(*seen.shape[:3], 1))
        self.num_leaks += int((~own).sum())
        out = block_sparse_attention(q, k, k, plan, scale=record.scale, backend=backend)
        self.num_outputs += 1
        self.kernel_error = max(self.kernel_error, _kernel_error(out, record, seen))


def _kernel_error(out: Tensor, record: CallRecord, seen: Tensor) -> float:
    """Error of the output over its budget: twice that of eager attention in the same dtype."""
    exact = _masked_attention(record, seen, torch.float64)
    rounded = _masked_attention(record, seen, out.dtype)
    # Probabilities and the online softmax round a few times more than one matrix product.
    band = 4 * torch.finfo(out.dtype).eps * float(exact.abs().max())
    budget = 2 * float((rounded - exact).abs().max()) + band
    return float((out.double() - exact).abs().max()) / budget


def _masked_attention(record: CallRecord, seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Eager attention over the named pairs in a dtype, head by head, as fp64."""
    q, k = record.q.to(dtype), record.k.to(dtype)
    groups = q.shape[1] // k.shape[1]
    heads = []
    for head in range(q.shape[1]):
        keys = k[:, head // groups]
        logits = (q[:, head] @ keys.transpose(-1, -2)) * record.scale
        logits = logits.masked_fill(~seen[:, head], float("-inf"))
        heads.append((logits.softmax(dim=-1) @ keys).double())
    return torch.stack(heads, dim=1)


@contextmanager
def _recording(method: AttentionMethod, examiner: _PlanExaminer) -> Iterator[None]:
    """Let the examiner hear the method's calls beside whoever listens already."""
    previous = method.recorder

    def record(call: CallRecord) -> None:
        examiner.examine(call, method.backend)
        if previous is not None:
            previous(call)

    method.recorder = record
    try:
        yield
    finally:
        method.recorder = previous


def _distance(logits: Tensor, reference: Tensor) -> float:
    """Worst token's |logits - reference| / |reference|; infinite for NaN."""
    worst = 0.0
    for rows, reference_rows in zip(logits.split(256, dim=1), reference.split(256, 1), strict=True):
        expected = reference_rows.double()
        error = (rows.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
        worst = max(worst, float(error.nan_to_num(nan=float("inf")).max()))
    return worst

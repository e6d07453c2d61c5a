"""The model as OpenCompass sees it: ours, already loaded and patched. Imports OpenCompass."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from opencompass.models import HuggingFacewithChatTemplate
from opencompass.models.base import BaseModel, LMTemplateParser
from opencompass.models.huggingface_above_v4_33 import _get_meta_template
from opencompass.registry import MODELS
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from typing_extensions import override

from experiments.benches.needle import NOT_FINITE
from experiments.benches.opencompass.prompts import render, tokenize
from experiments.benches.opencompass.truncation import cut_middle, prompt_limit
from experiments.content import input_digest
from experiments.models.load import LoadedModel
from experiments.settings.ranks import mean_over_ranks
from experiments.store import Record
from pbs.patch.huggingface import PatchReport, get_patch


@MODELS.register_module()
class PatchedModel(BaseModel):
    """Answers OpenCompass's prompts with the loaded model, one at a time, greedily.

    Models whose tokenizer has a chat template get the prompt as the user's turn and are decoded as
    ``HuggingFacewithChatTemplate`` does; others as ``HuggingFaceBaseModel``. Without truncation the
    answers equal theirs. Truncation is LongBench's own rule instead of theirs, which cuts from the
    left first and leaves no room for the answer.

    Args:
        loaded: the model, patched by the caller.
        max_seq_len: prompt plus answer, in tokens; None for what the model takes.
        chat_options: variables of the chat template, such as ``enable_thinking``.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        max_seq_len: int | None = None,
        chat_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(path="", max_seq_len=max_seq_len)
        self.loaded = loaded
        self.tokenizer = loaded.tokenizer
        self.chat_options = dict(chat_options or {})
        self.has_chat_template = bool(self.tokenizer.chat_template)
        self.template_parser = (
            _get_meta_template(None) if self.has_chat_template else LMTemplateParser()
        )
        self.begin({}, lambda _index, _record: None)

    def begin(self, known: Mapping[int, Record], add: Callable[[int, Record], None]) -> None:
        """Start a data set: OpenCompass asks its samples in order, from the first.

        Args:
            known: records of samples answered earlier, by index; they are not answered again.
            add: takes the index and the record of every sample that is answered now.
        """
        self._known, self._add, self._next = known, add, 0

    def generate(self, inputs: Sequence[Any], max_out_len: int, **_: Any) -> list[str]:
        """Answers of the next samples.

        Raises:
            ValueError: the prompt is not the one that the earlier record answers.
        """
        return [self._answer_next(prompt, max_out_len) for prompt in inputs]

    def get_token_len(self, prompt: str) -> int:
        """Tokens of a prompt as the model sees it, before truncation."""
        return len(tokenize(self.tokenizer, self._render(prompt)))

    def _answer_next(self, prompt: Any, max_out_len: int) -> str:
        index, self._next = self._next, self._next + 1
        text = self._render(prompt)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        record = self._known.get(index)
        if record is None:
            record = {"prompt": digest, **self.answer_sample(index, text, max_out_len)}
            self._add(index, record)
        elif record["prompt"] != digest:
            raise ValueError(
                f"sample {record['sample_id']} was answered for another prompt: the data changed "
                "since this run began; resume=false measures everything anew"
            )
        return record["completion"]

    @override
    def answer_sample(self, index: int, text: str, max_out_len: int) -> Record:
        """Answer the prompt of a sample; see :meth:`answer`."""
        return self.answer(text, max_out_len)

    def answer(self, text: str, max_out_len: int) -> Record:
        """Answer one rendered prompt: completion, lengths, time to first token, what ran sparse.

        Args:
            text: the prompt, chat template included.
            max_out_len: tokens of the answer at most.
        """
        started = time.perf_counter()
        model = self.loaded.model
        limit = prompt_limit(
            max_seq_len=self.max_seq_len,
            model_length=self.loaded.max_length,
            max_out_len=max_out_len,
        )
        whole = tokenize(self.tokenizer, text)
        kept = cut_middle(whole, limit)
        ids = torch.tensor([kept], device=self.loaded.device)
        first_token = _FirstToken(self.loaded)
        patch = get_patch(model)
        patch.reset()
        self.loaded.synchronise()
        first_token.start()
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_out_len,
                do_sample=False,
                pad_token_id=self._pad_token_id(),
                eos_token_id=self._end_token_ids() or None,
                logits_processor=LogitsProcessorList([_FiniteLogits()]),
                stopping_criteria=StoppingCriteriaList([first_token]),
            )
        answer = out[0, ids.shape[1] :]
        report = first_token.report
        density, *layer_density = mean_over_ranks(
            [report.density, *(layer.density for layer in report.layers)]
        )
        return {
            "num_prompt_tokens": len(whole),
            "num_input_tokens": len(kept),
            "input_digest": input_digest(kept),
            "num_output_tokens": len(answer),
            "is_truncated": len(kept) < len(whole),
            "completion": self._decode(answer),
            "prefill_seconds": first_token.seconds,
            "density": density,
            "layer_density": layer_density,
            "num_sparse_layers": report.num_sparse_layers,
            "sparse_calls": report.sparse_calls,
            "dense_calls": report.dense_calls,
            "seconds": time.perf_counter() - started,
        }

    def _render(self, prompt: Any) -> str:
        return render(self.tokenizer, prompt, self.chat_options)

    def _decode(self, answer: torch.Tensor) -> str:
        if not self.has_chat_template:
            return self.tokenizer.decode(answer, skip_special_tokens=True)
        text = self.tokenizer.decode(answer)
        for stop in {self.tokenizer.decode([token]) for token in self._end_token_ids()}:
            text = text.split(stop)[0]
        return text

    def _end_token_ids(self) -> list[int]:
        """Tokens that end an answer: the model's, and for chats the tokenizer's."""
        own = self.loaded.model.generation_config.eos_token_id
        ends = set() if own is None else {own} if isinstance(own, int) else set(own)
        if self.has_chat_template and self.tokenizer.eos_token_id is not None:
            ends.add(self.tokenizer.eos_token_id)
        return sorted(ends)

    def _pad_token_id(self) -> int | None:
        if self.tokenizer.pad_token_id is not None:
            return self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id


class _FiniteLogits(LogitsProcessor):
    """Changes nothing; refuses logits whose largest entry is no answer."""

    @override
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not scores.max(dim=-1).values.isfinite().all():  # NaN counts as the largest
            raise ValueError(NOT_FINITE)
        return scores


class _FirstToken(StoppingCriteria):
    """Never stops; notes time and attention counts when the first token is there."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self.seconds: float | None = None
        self.report: PatchReport | None = None

    def start(self) -> None:
        self._started = time.perf_counter()

    @override
    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if self.report is None:
            self._loaded.synchronise()
            self.seconds = time.perf_counter() - self._started
            self.report = get_patch(self._loaded.model).report()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@MODELS.register_module()
class StockModel(HuggingFacewithChatTemplate):
    """OpenCompass's own wrapper, made to run with transformers 5: the reference for ours."""

    def _load_tokenizer(self, *args: Any, **kwargs: Any) -> None:
        super()._load_tokenizer(*args, **kwargs)
        # transformers 5 has no batch_encode_plus; calling the tokenizer is the same.
        if not hasattr(self.tokenizer, "batch_encode_plus"):
            self.tokenizer.batch_encode_plus = self.tokenizer.__call__

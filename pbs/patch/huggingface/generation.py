"""What a patched model does otherwise when it generates."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def after_prefill(generator: Any) -> Any:
    """Let a generator of candidates (assistant, prompt look-up) have its say after the prefill.

    transformers appends the first candidates to the prompt. They would be part of the prefill and
    change what is selected for the prompt, hence the tokens. Dropped, as if the model had rejected
    them, they leave the first forward what it is in plain decoding.
    """

    def none_at_first(input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        del generator.get_candidates
        generator.get_candidates(input_ids, **kwargs)  # which fills an assistant's cache
        return input_ids, None

    # On the object, where it hides the class's method once.
    generator.get_candidates = none_at_first
    return generator

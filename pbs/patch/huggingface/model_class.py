"""The class of a patched model: what the patch adds to its own. Knows nothing of attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


def make_patched_class(
    model_class: type[PreTrainedModel], remove: Callable[[PreTrainedModel], object]
) -> type[PreTrainedModel]:
    """A subclass that ``with`` accepts, and whose prefill an assistant leaves as it is.

    ``with`` looks its methods up on the class. Name and module are the original's, so that
    save_pretrained writes the right architecture.

    Args:
        model_class: the model's own class.
        remove: removes the patch at the end of ``with``.
    """

    def enter(self: PreTrainedModel) -> PreTrainedModel:
        return self

    def leave(self: PreTrainedModel, *exception: object) -> None:  # noqa: ARG001 - the protocol
        remove(self)

    def get_candidate_generator(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return _after_prefill(model_class._get_candidate_generator(self, *args, **kwargs))  # type: ignore[attr-defined, unused-ignore]

    return type(
        model_class.__name__,
        (model_class,),
        {
            "__enter__": enter,
            "__exit__": leave,
            "__module__": model_class.__module__,
            "__qualname__": model_class.__qualname__,
            "__doc__": model_class.__doc__,
            "_get_candidate_generator": get_candidate_generator,
        },
    )


def _after_prefill(generator: Any) -> Any:
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

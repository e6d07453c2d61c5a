"""A prompt as the model gets it: in its chat template, with its special tokens.

Imports OpenCompass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opencompass.models.huggingface_above_v4_33 import (
    _convert_base_messages,
    _convert_chat_messages,
)


def render(tokenizer: Any, prompt: Any, chat_options: Mapping[str, Any]) -> str:
    """The text: the user's turn of a chat if the tokenizer has a template, else the prompt alone.

    Args:
        tokenizer: of the model.
        prompt: a text, or turns as OpenCompass writes them.
        chat_options: variables of the template.
    """
    if not tokenizer.chat_template:
        return _convert_base_messages([prompt])[0]
    messages = _convert_chat_messages([prompt])[0]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, **chat_options
    )


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a rendered prompt; a chat template brings its own special tokens."""
    return tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]

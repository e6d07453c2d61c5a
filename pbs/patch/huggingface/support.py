"""Which models the plug-in can serve, decided before anything is changed."""

from __future__ import annotations

import inspect
import re

from torch import nn
from transformers import PreTrainedModel

_ATTENTION_CLASS = re.compile(r"Attention\d*$")
_REGISTRY = "ALL_ATTENTION_FUNCTIONS"


def find_attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The model's attention modules that go through transformers' attention registry.

    Args:
        model: a causal language model of transformers.

    Returns:
        Qualified name to module, in order.

    Raises:
        TypeError: not a transformers model.
        NotImplementedError: an attention module that is no causal self-attention through the
            registry; the message names it.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"expected a transformers model (PreTrainedModel), got {type(model).__name__}; patch "
            "the model itself before wrapping or compiling it"
        )
    _refuse_config(model)
    layers = {name: m for name, m in model.named_modules() if _uses_registry(m)}
    for name, module in model.named_modules():
        if _ATTENTION_CLASS.search(type(module).__name__) and not _uses_registry(module):
            inner = [child for child in layers if child.startswith(f"{name}.") or not name]
            if not inner:
                raise NotImplementedError(
                    f"{name} ({type(module).__name__}) of {type(model).__name__} does not go "
                    "through transformers' attention registry; pbs cannot replace it and has "
                    "changed nothing"
                )
    if not layers:
        raise NotImplementedError(
            f"{type(model).__name__} has no attention layer that goes through transformers' "
            "attention registry; pbs has changed nothing"
        )
    for name, module in layers.items():
        _refuse_layer(name, module)
    return layers


def _uses_registry(module: nn.Module) -> bool:
    """Whether the module's forward looks its attention function up in the registry."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and _REGISTRY in code.co_names


def _refuse_config(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"{type(model).__name__} is an encoder-decoder model; pbs attention is for "
            "decoder-only language models"
        )
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise NotImplementedError(
            f"{type(model).__name__} has layers with chunked attention, which pbs attention does "
            "not compute; run it with attn_implementation='sdpa'"
        )


def _refuse_layer(name: str, module: nn.Module) -> None:
    kind = type(module).__name__
    is_cross = "CrossAttention" in kind or getattr(module, "is_cross_attention", False)
    if is_cross or not getattr(module, "is_causal", True):
        raise NotImplementedError(
            f"{name} ({kind}) is not causal self-attention; pbs attention is for decoder-only "
            "language models. For a multimodal model patch its language model alone"
        )
    if not isinstance(getattr(module, "layer_idx", None), int):
        raise NotImplementedError(
            f"{name} ({kind}) has no layer_idx; pbs cannot tell its layers apart"
        )

"""Layers whose attention vLLM gives to others: counted, or refused, so that none is quietly dense.

vLLM tells a plug-in neither which backend a layer got nor that one has latent attention. So the two
classes of layers are extended by a look at each layer that was made.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

from pbs.patch.vllm.counters import COUNTERS, logger
from pbs.patch.vllm.settings import ServingSettings

# Attention over a compressed cache, which a selection of keys does not see.
LATENT = "multi-head latent attention"


def watch() -> None:
    """Look at every attention layer that is made from now on in this process."""
    from vllm.model_executor.layers.attention import Attention, MLAAttention

    _after_init(Attention, examine)
    _after_init(MLAAttention, count_latent)


def _after_init(layer_class: Any, look: Callable[[Any], None]) -> None:
    """Let the constructor of a class end with a look at its object, where pbs was asked for."""
    stock = layer_class.__init__
    if getattr(stock, "looks_for_pbs", False):
        return

    @wraps(stock)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        from vllm.config import get_current_vllm_config

        if ServingSettings.of(get_current_vllm_config()) is not None:
            look(self)

    construct.looks_for_pbs = True  # type: ignore[attr-defined]
    layer_class.__init__ = construct


def examine(layer: Any) -> None:
    """Check that a layer has a backend of this plug-in.

    Args:
        layer: vLLM's, with ``attn_backend`` and ``impl``.

    Raises:
        ValueError: it has another one; the message says what to ask for.
    """
    sparse = getattr(layer.impl, "pbs", None)
    if sparse is None:
        raise ValueError(
            f"pbs was asked for, but {layer.layer_name} got vLLM's backend "
            f"{layer.attn_backend.get_name()}: add --attention-backend CUSTOM (in Python "
            "attention_backend='CUSTOM'), or leave pbs out"
        )
    if not layer.attn_backend.__module__.startswith("pbs."):
        # vLLM derives backends of its own for chunked local attention, sinks and others; they call
        # this plug-in with batches that are not the requests.
        sparse.reason = sparse.reason or f"backend {layer.attn_backend.get_name()}"


def count_latent(layer: Any) -> None:
    """Count a latent layer's chunks of prompts as dense.

    Args:
        layer: vLLM's, with ``forward_impl``.
    """
    from vllm.model_executor.models.utils import extract_layer_index

    index, stock = extract_layer_index(layer.layer_name), layer.forward_impl
    place = list(signature(stock).parameters).index("attn_metadata")
    if COUNTERS.start():
        logger.warning("pbs: layers with %s stay dense", LATENT)

    @wraps(stock)
    def forward_impl(*args: Any, **kwargs: Any) -> Any:
        metadata = args[place] if len(args) > place else kwargs.get("attn_metadata")
        if metadata is not None:
            # Sparse latent backends do not tell prompts from decoding: a call then counts once.
            COUNTERS.layer(index).add_dense({LATENT: getattr(metadata, "num_prefills", 1)})
            COUNTERS.write_sometimes()
        return stock(*args, **kwargs)

    layer.forward_impl = forward_impl

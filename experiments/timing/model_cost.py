"""What a prefill of a whole model has to do and to hold: counted, not measured.

Plain Python. Sizes are lower bounds: what a library allocates on top is left out. Legend: see
:mod:`pbs.ops.grid`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from experiments.timing.cost_model import Shape, Work, attention_memory, method_cost


@dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder with gated feed-forward layers, as in Llama and Qwen."""

    hidden_size: int
    num_layers: int
    intermediate_size: int
    vocab_size: int
    shape: Shape
    is_tied: bool = False

    @classmethod
    def of(cls, config: Any, *, element_size: int = 2) -> Architecture | None:
        """From a config of transformers; None for layers of another kind (experts, other sizes).

        Args:
            config: of the text model.
            element_size: bytes of one weight.
        """
        names = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
        sizes = [getattr(config, name, None) for name in names]
        q_heads = getattr(config, "num_attention_heads", None)
        has_experts = any(hasattr(config, name) for name in ("num_experts", "num_local_experts"))
        if has_experts or not q_heads or not all(isinstance(size, int) for size in sizes):
            return None
        kv_heads = getattr(config, "num_key_value_heads", None) or q_heads
        head_dim = getattr(config, "head_dim", None) or sizes[0] // q_heads
        shape = Shape(q_heads, kv_heads, head_dim, element_size)
        return cls(*sizes, shape, bool(getattr(config, "tie_word_embeddings", False)))

    def share(self, num_ranks: int) -> Architecture:
        """What one of several processes has of every layer; embeddings are left whole.

        Args:
            num_ranks: divides heads and the feed-forward size.
        """
        shape = Shape(
            self.shape.q_heads // num_ranks,
            self.shape.kv_heads // num_ranks,
            self.shape.head_dim,
            self.shape.element_size,
        )
        return replace(self, shape=shape, intermediate_size=self.intermediate_size // num_ranks)

    @property
    def num_parameters(self) -> int:
        """Weights of all matrices; norms are negligible."""
        embeddings = self.hidden_size * self.vocab_size * (1 if self.is_tied else 2)
        return self.num_layers * self.layer_parameters + embeddings

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer: projections of attention and three matrices after it."""
        shape = self.shape
        attention = self.hidden_size * shape.head_dim * (2 * shape.q_heads + 2 * shape.kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size


def prefill_cost(
    architecture: Architecture,
    num_tokens: int,
    *,
    method: str = "flash",
    density: float = 1.0,
    block_size: int = 128,
    shared_order: bool = False,
    stride: int = 8,
) -> dict[str, Work]:
    """Work of a prefill up to the first token, by stage, summed over the layers.

    Args:
        architecture: of one process, if several share the model.
        num_tokens: N.
        method: see :func:`experiments.timing.cost_model.method_cost`, as the arguments below.
        density: tiles computed / causal tiles.
        block_size: B.
        shared_order: one order per key/value head.
        stride: of antidiagonal scores.

    Returns:
        The method's stages and "linear", everything that is a product with weights; the last
        token's logits are among them. Norms, RoPE and sums are not counted.
    """
    layers, size = architecture.num_layers, architecture.shape.element_size
    one = method_cost(
        method,
        architecture.shape,
        num_tokens,
        density=density,
        block_size=block_size,
        shared_order=shared_order,
        stride=stride,
    )
    stages = {
        name: Work(layers * work.flops, layers * work.num_bytes, layers * work.num_launches)
        for name, work in one.items()
    }
    logits = architecture.hidden_size * architecture.vocab_size
    weights = layers * architecture.layer_parameters
    stages["linear"] = Work(
        flops=2.0 * (weights * num_tokens + logits),
        num_bytes=float(size * (weights + logits)),
        num_launches=7 * layers + 1,
    )
    return stages


def model_memory(
    architecture: Architecture,
    num_tokens: int,
    *,
    method: str = "flash",
    density: float = 1.0,
    shared_order: bool = False,
    keeps_cache: bool = True,
) -> dict[str, float]:
    """Bytes of a prefill of one prompt: weights, cache and the fuller of a layer's two halves."""
    size = architecture.shape.element_size
    hidden = float(num_tokens * architecture.hidden_size * size)
    feed_forward = 3.0 * num_tokens * architecture.intermediate_size * size
    attention = sum(
        attention_memory(
            method, architecture.shape, num_tokens, density=density, shared_order=shared_order
        ).values()
    )
    cache = 2.0 * architecture.num_layers * architecture.shape.key_bytes(num_tokens)
    return {
        "weights": float(architecture.num_parameters * size),
        "cache": cache if keeps_cache else 0.0,
        "residual stream": 2 * hidden,
        "layer": max(feed_forward, attention),
    }

"""What a layer must not ask for, said before anything is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pbs.ops.grid import Geometry

# Keyword arguments that do not change what attention computes.
_HARMLESS = frozenset(
    {
        "cache_position",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "return_dict",
        "use_cache",
    }
)

# Where a tensor of positions keeps which layer looked at it first, by the padding it came with.
_FIRST_LAYERS = "_pbs_first_layers"


def refuse_unsupported(
    module: nn.Module,
    dropout: float,
    is_causal: bool,
    kwargs: dict[str, Any],
) -> None:
    """Refuse what attention here does not compute, by what the layer passes."""
    name = type(module).__name__
    if not is_causal:
        raise NotImplementedError(
            f"{name} is not causal (encoder or cross-attention); pbs attention is for causal "
            "self-attention. Run this model with attn_implementation='sdpa'"
        )
    if dropout > 0:
        raise NotImplementedError(
            f"{name} asks for attention dropout {dropout}; pbs attention drops nothing: "
            "call model.eval()"
        )
    for key, value in kwargs.items():
        if value is None or value is False or key in _HARMLESS:
            continue
        if key == "output_attentions":
            raise NotImplementedError(
                "output_attentions=True needs attention weights, which pbs attention never forms; "
                "load the model with attn_implementation='eager'"
            )
        raise NotImplementedError(
            f"{name} passes {key!r}, which pbs attention does not know; ignoring it could give "
            "wrong results. Run this model with attn_implementation='sdpa'"
        )


def refuse_packed(
    position_ids: Tensor | None, geometry: Geometry | None, layer_idx: int | None
) -> None:
    """Refuse positions that start again inside a sequence.

    Reading them back waits for the device, so they are looked at once per forward, by the first
    layer that gets them, whichever it is. Layers of one forward get one tensor; that layer, and any
    before it, is where the next forward begins.
    """
    if position_ids is None or position_ids.ndim != 2:
        return
    if geometry is not None and geometry.is_unpadded:
        geometry = None
    first_layers = position_ids.__dict__.setdefault(_FIRST_LAYERS, {})
    first = first_layers.get(geometry)
    if first is not None and layer_idx is not None and layer_idx > first:
        return
    if _starts_again(position_ids, geometry):
        raise NotImplementedError(
            "position_ids start again inside a sequence: packed sequences would attend to each "
            "other. Pass them as a padded batch with an attention_mask"
        )
    first_layers[geometry] = layer_idx


def _starts_again(position_ids: Tensor, geometry: Geometry | None) -> bool:
    """Whether a position is no larger than the one before it, both of real tokens."""
    steps_back = position_ids[:, 1:] <= position_ids[:, :-1]
    if geometry is not None:
        rows = torch.arange(1, position_ids.shape[1], device=position_ids.device)
        rows = rows + geometry.query_offset
        starts = torch.tensor(geometry.starts, device=position_ids.device)[:, None]
        ends = torch.tensor(geometry.ends, device=position_ids.device)[:, None]
        steps_back = steps_back & (rows > starts) & (rows < ends)
    return bool(steps_back.any())

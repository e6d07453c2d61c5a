"""The attention function for transformers' registry. Legend: see :mod:`pbs.ops.grid`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pbs import compiled
from pbs.methods import AttentionMethod, build_method
from pbs.ops.dense import dense_attention, dense_decode
from pbs.ops.grid import Geometry
from pbs.ops.inputs import is_autocast, needs_gradient
from pbs.patch.huggingface.masks import PaddingMask, agreed_window, read_mask
from pbs.patch.huggingface.refusals import refuse_packed, refuse_unsupported
from pbs.patch.huggingface.report import LayerCounter

# Where a patched attention module keeps what the patch decided for it.
LAYER_ATTRIBUTE = "_pbs_layer"
# The same for a model that was loaded with attn_implementation="pbs" and never patched.
LOADED_ATTRIBUTE = "_pbs_loaded_layer"


@dataclass
class PatchedLayer:
    """What one attention module runs, and who counts it; a skipped layer stays dense."""

    method: AttentionMethod
    counter: LayerCounter
    is_skipped: bool = False


@dataclass(frozen=True)
class _Special:
    """What a layer asks for beyond plain causal attention."""

    sliding_window: int | None
    softcap: float | None
    sinks: Tensor | None

    @property
    def reason(self) -> str:
        """Why such a layer is computed dense; "" for a plain layer."""
        reasons = []
        if self.sliding_window is not None:
            reasons.append(f"sliding window {self.sliding_window}")
        if self.softcap is not None:
            reasons.append("softcap")
        if self.sinks is not None:
            reasons.append("attention sinks")
        return ", ".join(reasons)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered as "pbs".

    Args:
        module: the attention layer.
        query: ``[Z, Hq, Nq, D]``, after RoPE.
        key: ``[Z, Hkv, Nk, D]``, with the cache.
        value: ``[Z, Hkv, Nk, Dv]``, Dv at most D.
        attention_mask: what :func:`~pbs.patch.huggingface.masks.padding_mask` gave.
        scaling: factor of the logits; default 1 / sqrt(D).
        dropout: must be 0.
        sliding_window: the layer's window, if it has one.
        softcap: the layer's soft cap of the logits, if it has one.
        s_aux: the layer's attention sinks ``[Hq]``, if it has them.
        position_ids: ``[Z or 1, Nq]``; looked at only to refuse packed sequences.
        is_causal: overrides ``module.is_causal``.
        **kwargs: anything else that changes the result is refused.

    Returns:
        ``[Z, Nq, Hq, Dv]``, contiguous, and None (no attention weights are ever formed).

    Raises:
        NotImplementedError: the layer asks for something this function does not compute; grad mode
            is on, query, key or value requires a gradient, and the method's plan is sparse. Dense
            calls and backend "reference" have their gradients.
        ValueError: the mask does not fit the queries and keys.
    """
    query, key, value = _autocast(query, key, value)
    followed = (query, key, value) if s_aux is None else (query, key, value, s_aux)
    settings = (scaling, dropout, sliding_window, softcap, s_aux, position_ids, is_causal)
    if torch.compiler.is_compiling() and attention_mask is None and not needs_gradient(*followed):
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        refuse_unsupported(module, dropout, is_causal, kwargs)
        handle = compiled.handle_of(module)
        return patched_attention(query, key, value, handle, *settings[:1], *settings[2:]), None
    return _attend(module, query, key, value, attention_mask, *settings, kwargs)


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors in autocast's dtype, if it is on, as PyTorch's own attention takes them.

    Some models pass queries in fp32 beside values that autocast has made.
    """
    if not is_autocast(tensors[0]) or tensors[0].dtype == torch.float64:
        return list(tensors)
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return [tensor.to(dtype) for tensor in tensors]


@torch.library.custom_op("pbs::patched_attention", mutates_args=())
def patched_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    module: int,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
    position_ids: Tensor | None,
    is_causal: bool | None,
) -> Tensor:
    """:func:`attention_forward` without a mask as an operator, for compiled models.

    Args:
        query: as there, like all but ``module``.
        key: as there.
        value: as there.
        module: :func:`pbs.compiled.handle_of` the attention layer.
        scaling: as there.
        sliding_window: as there.
        softcap: as there.
        s_aux: as there.
        position_ids: as there.
        is_causal: as there.

    Returns:
        ``[Z, Nq, Hq, Dv]``, contiguous.
    """
    owner = compiled.owner_of(module)
    settings = (scaling, 0.0, sliding_window, softcap, s_aux, position_ids, is_causal)
    return _attend(owner, query, key, value, None, *settings, {})[0]


@patched_attention.register_fake
def _(query: Tensor, _key: Tensor, value: Tensor, *_: object) -> Tensor:
    batch, num_heads, num_queries, _head_dim = query.shape
    return query.new_empty(batch, num_queries, num_heads, value.shape[3])


# How the mask of a padded batch is laid out is read back, once per forward, which no graph holds;
# nor does one hold a call that needs a gradient, which the operator above does not have.
@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
    position_ids: Tensor | None,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """See :func:`attention_forward`."""
    layer = getattr(module, LAYER_ATTRIBUTE, None) or loaded_layer(module)
    layer_idx = getattr(module, "layer_idx", None)
    if is_causal is None or query.shape[2] == 1 or isinstance(attention_mask, PaddingMask):
        # Some models say False whenever they pass a mask; a mask of ours is known to be causal.
        is_causal = getattr(module, "is_causal", True)
    refuse_unsupported(module, dropout, is_causal, kwargs)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    head_dim = value.shape[3]
    value = _pad_head_dim(value, query.shape[3], module)
    mask, layout = read_mask(attention_mask, query, key)
    if layout is not None and layout.num_queries > 1:
        sliding_window = agreed_window(sliding_window, layout)
    elif sliding_window is not None and sliding_window >= key.shape[2]:
        sliding_window = None
    special = _Special(sliding_window, softcap, s_aux)
    if query.shape[2] == 1:
        out = _decode(query, key, value, mask, scale, special)
        layer.counter.add_decode()
    else:
        geometry = None if layout is None else layout.geometry
        refuse_packed(position_ids, geometry, layer_idx)
        out = _prefill(layer, query, key, value, scale, layer_idx, geometry, special)
    return out[..., :head_dim].transpose(1, 2).contiguous(), None


def _prefill(
    layer: PatchedLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    layer_idx: int | None,
    geometry: Geometry | None,
    special: _Special,
) -> Tensor:
    """The layer's method, or dense attention where the model or the user asks for it."""
    reason = special.reason or ("skipped layer" if layer.is_skipped else "")
    if reason:
        _count_dense(layer, reason, query, key, geometry)
        return _dense_prefill(query, key, value, scale, geometry, special)
    return layer.method(
        query,
        key,
        value,
        scale=scale,
        layer_idx=layer_idx,
        geometry=geometry,
        recorder=layer.counter.add_record,
    )


def _count_dense(
    layer: PatchedLayer, reason: str, query: Tensor, key: Tensor, geometry: Geometry | None
) -> None:
    """Count as a method's records do: each length of a padded batch, decoding steps as such."""
    if geometry is None:
        geometry = Geometry.unpadded(query.shape[0], query.shape[2], key.shape[2])
    for members, rows, slots in geometry.spans():
        if layer.method.is_decode_step(rows.stop - rows.start, slots.stop - slots.start):
            layer.counter.add_decode()
        else:
            layer.counter.add_dense(reason, num_sequences=len(members))


def _dense_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    geometry: Geometry | None,
    special: _Special,
) -> Tensor:
    """Dense attention with the layer's options, each sequence without its padding."""
    attend = partial(
        dense_attention,
        scale=scale,
        sliding_window=special.sliding_window,
        softcap=special.softcap,
        sinks=special.sinks,
    )
    if geometry is None or geometry.is_unpadded:
        return attend(query, key, value)
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    for group, rows, slots in geometry.spans():
        # A slice where it will do: a list of indices copies the tensors and waits for the device.
        is_run = group == list(range(group[0], group[-1] + 1))
        members = slice(group[0], group[-1] + 1) if is_run else group
        part = attend(query[members, :, rows], key[members, :, slots], value[members, :, slots])
        out[members, :, rows] = part
    return out


def _decode(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, special: _Special
) -> Tensor:
    """One query per sequence; a mask, if there is one, already contains the window."""
    if special.sliding_window is not None:
        key, value = key[:, :, -special.sliding_window :], value[:, :, -special.sliding_window :]
        mask = None if mask is None else mask[:, -special.sliding_window :]
    return dense_decode(
        query,
        key,
        value,
        scale=scale,
        visible=mask,
        softcap=special.softcap,
        sinks=special.sinks,
    )


def _pad_head_dim(value: Tensor, head_dim: int, module: nn.Module) -> Tensor:
    """Values as wide as the keys (multi-head latent attention has narrower ones)."""
    missing = head_dim - value.shape[3]
    if missing < 0:
        raise NotImplementedError(
            f"{type(module).__name__} has values wider than its keys, got {value.shape[3]} and "
            f"{head_dim}; pbs attention supports values at most as wide as keys"
        )
    return pad(value, (0, missing)) if missing else value


@cache
def _default_method() -> AttentionMethod:
    return build_method("pbs")


def loaded_layer(module: nn.Module) -> PatchedLayer:
    """Of a model loaded with attn_implementation="pbs" and never patched: the default method."""
    found = getattr(module, LOADED_ATTRIBUTE, None)
    if found is None:
        found = PatchedLayer(_default_method(), LayerCounter(int(getattr(module, "layer_idx", -1))))
        setattr(module, LOADED_ATTRIBUTE, found)
    return found

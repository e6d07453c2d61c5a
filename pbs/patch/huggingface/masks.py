"""The mask function for transformers' registry: one row per sequence, never an N x N mask.

transformers asks once per forward and kind of layer for a mask and hands it to every layer of the
kind. Ours is a bool ``[Z, Nk]`` tensor, or None when there is nothing to mask, and carries what the
layers need to know, so that padding is looked up once per forward. Legend: see
:mod:`pbs.ops.grid`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from pbs.ops.grid import Geometry


@dataclass(frozen=True)
class MaskLayout:
    """What a :class:`PaddingMask` stands for.

    Attributes:
        num_queries: Nq of the forward it was made for.
        geometry: real tokens and the slot of the first query; None for a decoding step, whose mask
            is complete as it stands.
        sliding_window: keys a query sees, itself included; None when all. None also when the window
            is no shorter than the sequence, and for a decoding step.
        num_written: key slots written so far (fewer than Nk in a static cache).
    """

    num_queries: int
    geometry: Geometry | None
    sliding_window: int | None
    num_written: int | None


class PaddingMask(Tensor):
    """Keys that hold real tokens, bool ``[Z, Nk]``, with its :class:`MaskLayout`.

    A tensor, because models, caches and device hooks move masks around with tensor methods. Moving
    or copying keeps the layout; any other operation gives a plain tensor.
    """

    key_layout: MaskLayout

    @classmethod
    def from_tensor(cls, mask: Tensor, layout: MaskLayout) -> PaddingMask:
        """Attach a layout to a bool ``[Z, Nk]`` tensor."""
        result = mask.as_subclass(cls)
        result.key_layout = layout
        return result

    def plain(self) -> Tensor:
        """The same values as an ordinary tensor."""
        return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Keep the layout through the operations that keep the values."""
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        source = args[0] if args else None
        if func not in _KEEPS_VALUES or not isinstance(source, PaddingMask):
            return result
        if result.dtype != torch.bool or result.shape != source.shape:
            return result
        return cls.from_tensor(result, source.key_layout)


_KEEPS_VALUES = {
    Tensor.to,
    Tensor.cpu,
    Tensor.cuda,
    Tensor.bool,
    Tensor.clone,
    Tensor.contiguous,
    Tensor.detach,
}


# It looks into mask functions and at padding, which no graph holds: a compiled model has one break
# here per forward, before its layers.
@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def padding_mask(
    batch_size: int,
    *,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> PaddingMask | None:
    """The mask function registered as "pbs".

    Args:
        batch_size: Z.
        kv_length: Nk, key slots the layers will see.
        kv_offset: absolute position of the first of them (> 0 for a full sliding-window cache).
        mask_function: transformers' predicate for the kind of layer.
        attention_mask: bool ``[Z, >= written slots]``, False for padding.
        **kwargs: names differ by version: ``q_length`` and ``q_offset``, or ``cache_position``.

    Returns:
        None if every key is real, the queries are the last ones and no window applies; else bool
        ``[Z, Nk]`` with its layout.

    Raises:
        NotImplementedError: a mask that is not causal, with or without a sliding window; padding
            between real tokens.
    """
    if isinstance(attention_mask, PaddingMask) and attention_mask.shape[1] == kv_length:
        # generate() prepares the masks of static caches ahead of the forward, which asks again.
        return attention_mask
    num_queries, query_position, device = _query_placement(kwargs)
    window = _sliding_window_of(mask_function)
    if attention_mask is not None:
        device = attention_mask.device
    if num_queries == 1:
        return _decode_mask(
            batch_size, kv_length, kv_offset, query_position, window, attention_mask, device
        )
    query_offset = int(query_position) - kv_offset
    num_written = query_offset + num_queries
    if attention_mask is None and num_written == kv_length and (window or kv_length) >= kv_length:
        return None
    mask = _cut(
        attention_mask,
        batch_size,
        kv_length,
        kv_offset,
        device,
        num_written=kv_offset + num_written,
    )
    if num_written < kv_length:
        mask = mask & (torch.arange(kv_length, device=mask.device) < num_written)
    geometry = Geometry.from_padding_mask(mask, num_queries=num_queries, query_offset=query_offset)
    if window is not None and window >= num_written:
        window = None
    if geometry.is_unpadded and window is None:
        return None
    return PaddingMask.from_tensor(mask, MaskLayout(num_queries, geometry, window, num_written))


def _decode_mask(
    batch_size: int,
    kv_length: int,
    kv_offset: int,
    query_position: int | Tensor,
    window: int | None,
    attention_mask: Tensor | None,
    device: torch.device,
) -> PaddingMask | None:
    """Every key the single query may see, without reading values back for a static cache."""
    slot = query_position - kv_offset
    query_is_last = isinstance(slot, int) and slot == kv_length - 1
    window_acts = window is not None and window < kv_length
    if query_is_last and not window_acts and attention_mask is None:
        return None
    num_written = query_position + 1 if isinstance(query_position, int) else 0
    mask = _cut(attention_mask, batch_size, kv_length, kv_offset, device, num_written=num_written)
    if query_is_last and not window_acts and bool(mask.all()):
        return None
    slots = torch.arange(kv_length, device=mask.device)
    slot = slot.to(mask.device) if isinstance(slot, Tensor) else slot
    mask = mask & (slots <= slot)
    if window is not None:
        mask = mask & (slots > slot - window)
    return PaddingMask.from_tensor(mask, MaskLayout(1, None, None, None))


def _cut(
    attention_mask: Tensor | None,
    batch_size: int,
    kv_length: int,
    kv_offset: int,
    device: torch.device,
    *,
    num_written: int,
) -> Tensor:
    """The part of the padding mask that belongs to the key slots, bool ``[Z, Nk]``."""
    if attention_mask is None:
        return torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    if attention_mask.ndim != 2:
        raise NotImplementedError(
            "pbs attention builds its masks from a padding mask [Z, N], got an attention_mask of "
            f"shape {tuple(attention_mask.shape)}; pass 1 for real tokens and 0 for padding"
        )
    if attention_mask.shape[0] not in (1, batch_size):
        raise ValueError(
            f"attention_mask has {attention_mask.shape[0]} sequences, the input has {batch_size}; "
            "pass one row per sequence"
        )
    if attention_mask.shape[1] < num_written:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} tokens, the cache and the input have "
            f"{num_written}; pass one entry per token, those of the cache included"
        )
    part = attention_mask[:, kv_offset : kv_offset + kv_length] != 0
    missing = kv_length - part.shape[1]
    part = torch.nn.functional.pad(part, (0, missing)) if missing else part
    return part.expand(batch_size, -1)


def read_mask(
    attention_mask: Tensor | None, query: Tensor, key: Tensor
) -> tuple[Tensor | None, MaskLayout | None]:
    """The mask as a plain tensor with its layout, checked against the tensors it came with."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    if num_queries > num_keys:
        raise ValueError(
            f"more queries than keys: got {num_queries} and {num_keys}; causal self-attention keys "
            "include the queries' own tokens"
        )
    if attention_mask is None:
        return None, None
    if attention_mask.ndim != 2:
        raise NotImplementedError(
            "pbs attention got an attention mask of shape "
            f"{tuple(attention_mask.shape)}: a custom mask, or a model that builds its masks "
            "outside transformers' mask registry. Pass a padding mask [Z, N], or run this model "
            "with attn_implementation='sdpa'"
        )
    if attention_mask.shape != (query.shape[0], num_keys):
        raise ValueError(
            f"expected an attention mask [{query.shape[0]}, {num_keys}] (sequences, keys), got "
            f"{tuple(attention_mask.shape)}; layers with another number of keys than the mask was "
            "made for (cross-attention, shared caches) are not supported"
        )
    if isinstance(attention_mask, PaddingMask):
        layout = attention_mask.key_layout
        if layout.num_queries != num_queries:
            raise ValueError(
                f"the attention mask was made for {layout.num_queries} queries, got {num_queries}"
            )
        return attention_mask.plain(), layout
    return attention_mask != 0, _layout_of_plain_mask(attention_mask, num_queries)


def _layout_of_plain_mask(mask: Tensor, num_queries: int) -> MaskLayout:
    """Layout of a padding mask that did not come from the registry: queries must be last."""
    num_keys = mask.shape[1]
    if num_queries == 1:
        return MaskLayout(1, None, None, None)
    geometry = Geometry.from_padding_mask(mask, num_queries=num_queries)
    if max(geometry.ends) < num_keys:
        raise NotImplementedError(
            f"the padding mask leaves the last {num_keys - max(geometry.ends)} of {num_keys} keys "
            "out in every sequence and does not say where the queries are; register the mask "
            "function of pbs for this model's attention, or cut the keys"
        )
    return MaskLayout(num_queries, geometry, None, num_keys)


def agreed_window(of_layer: int | None, layout: MaskLayout) -> int | None:
    """The window that acts; the mask has the say, as in transformers' own eager attention."""
    if of_layer is None or of_layer == layout.sliding_window:
        return layout.sliding_window
    is_wider = layout.num_written is not None and of_layer >= layout.num_written
    if layout.sliding_window is None and is_wider:
        return None
    raise NotImplementedError(
        f"the layer asks for a sliding window of {of_layer}, its mask for "
        f"{layout.sliding_window or 'none'}; pbs attention does not guess. Run this model with "
        "attn_implementation='sdpa'"
    )


def _query_placement(kwargs: Mapping[str, Any]) -> tuple[int, int | Tensor, torch.device]:
    """Nq, absolute position of the first query, and the device, in any version's words."""
    if "cache_position" in kwargs:
        positions: Tensor = kwargs["cache_position"]
        return positions.shape[0], int(positions[0]), positions.device
    position = kwargs.get("q_offset", 0)
    device = kwargs.get("device")
    if isinstance(position, Tensor) and position.device.type == "cpu":
        position = int(position)
    return kwargs["q_length"], position, torch.device("cpu" if device is None else device)


def _sliding_window_of(mask_function: Callable[..., Any]) -> int | None:
    """The window of a causal mask function, None if it has none; refuses everything else."""
    windows = []
    is_causal = False
    for part in _conjuncts(mask_function):
        name = _factory_name(part)
        if name == "causal_mask_function":
            is_causal = True
        elif name == "sliding_window_overlay":
            windows.append(int(_captured(part)["sliding_window"]))
        elif not _is_one_sequence(part):
            raise _refused(name)
    if not is_causal:
        raise _refused("bidirectional_mask_function")
    return min(windows, default=None)


def _conjuncts(mask_function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """The predicates that all have to hold."""
    if _factory_name(mask_function) == "remap_positions_for_packed_sequence":
        # A compiled model adds it to the packing predicate, even when nothing is packed.
        return _conjuncts(_captured(mask_function)["mask_function"])
    if _factory_name(mask_function) != "and_masks":
        return [mask_function]
    parts = _captured(mask_function)["mask_functions"]
    return [leaf for part in parts for leaf in _conjuncts(part)]


def _is_one_sequence(mask_function: Callable[..., Any]) -> bool:
    """True for the packing predicate of versions that add it even when nothing is packed."""
    if _factory_name(mask_function) != "packed_sequence_mask_function":
        return False
    sequence_of_token: Tensor = _captured(mask_function)["packed_sequence_mask"]
    return not bool(sequence_of_token.any())


def _factory_name(mask_function: Callable[..., Any]) -> str:
    """The function of ``masking_utils`` that made it; its own full name if another module did."""
    name: str = getattr(mask_function, "__qualname__", repr(mask_function))
    if getattr(mask_function, "__module__", None) != masking_utils.__name__:
        return name
    return name.partition(".")[0]


def _captured(function: Callable[..., Any]) -> dict[str, Any]:
    """Variables a closure holds, by name."""
    closure = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars if closure else ()
    return {name: cell.cell_contents for name, cell in zip(names, closure, strict=True)}


_MEANINGS = {
    "packed_sequence_mask_function": "packed sequences (position_ids that start again)",
    "chunked_overlay": "chunked attention",
    "bidirectional_mask_function": "bidirectional attention",
    "sliding_window_bidirectional_overlay": "bidirectional attention",
    "or_masks": "a mask that opens parts of the future (image or prefix tokens)",
}


def _refused(name: str) -> NotImplementedError:
    meaning = _MEANINGS.get(name, f"the mask function {name!r}")
    return NotImplementedError(
        f"pbs attention computes causal masks, with or without a sliding window; this model asks "
        f"for {meaning}. Run it with attn_implementation='sdpa' or remove the patch"
    )

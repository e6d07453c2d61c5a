"""Attention of one layer: chunks of prompts by the method, the rest by vLLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pbs.patch.vllm.batch import Chunk, Split
from pbs.patch.vllm.counters import COUNTERS, logger
from pbs.patch.vllm.settings import ServingSettings


class SparseLayer:
    """One layer's method.

    Args:
        settings: of the server.
        reason: why every call of this layer is dense, such as "sliding window"; "" if none is.
    """

    def __init__(self, settings: ServingSettings, reason: str) -> None:
        self.settings = settings
        self.reason = reason
        self.method = settings.build()
        if COUNTERS.start():
            logger.info("pbs: prompts from %d tokens on: %r", settings.min_keys, self.method)

    def reason_to_run_dense(self, layer_idx: int) -> str:
        """Why the layer leaves everything to vLLM; "" if it does not."""
        return "skip_layers" if layer_idx in self.settings.skip_layers else self.reason

    def forward(
        self,
        metadata: Any,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        *,
        scale: float,
        pages: Callable[[Chunk], tuple[Tensor, Tensor]],
        dense: Callable[[slice | Tensor, Any, Tensor], object],
    ) -> Tensor:
        """Fill ``output``.

        Args:
            metadata: vLLM's of the batch, its split in the attribute ``pbs``.
            layer_idx: the layer.
            query: ``[T, Hq, D]``, all requests one behind the other.
            key: ``[T, Hkv, D]``, of the new tokens.
            value: ``[T, Hkv, D]``.
            output: ``[T, Hq, D]``.
            scale: factor of the logits.
            pages: all keys and values that a chunk sees, from the cache, ``[Nk, Hkv, D]`` each.
            dense: vLLM's attention of some rows with their metadata, into a tensor of their size.
        """
        split: Split = metadata.pbs
        counter = COUNTERS.layer(layer_idx)
        counter.add_dense(split.dense)
        reason = self.reason_to_run_dense(layer_idx)
        if reason or not split.chunks:
            if reason:
                counter.add_dense({reason: len(split.chunks)})
            dense(slice(None), metadata, output)
            return output
        for chunk in split.chunks:
            rows = chunk.rows
            keys, values = (key[rows], value[rows]) if chunk.is_whole else pages(chunk)
            q, k, v = (x.transpose(0, 1)[None] for x in (query[rows], keys, values))
            out = self.method(
                q, k, v, scale=scale, layer_idx=layer_idx, recorder=counter.add_record
            )
            output[rows] = out[0].transpose(0, 1)
        if split.rest is not None and split.rest_rows is not None:
            left = split.rest_rows
            if isinstance(left, slice):
                dense(left, split.rest, output[left])
            else:
                part = torch.empty_like(output[left])
                dense(left, split.rest, part)
                output[left] = part
        COUNTERS.write_sometimes()
        return output


def reasons(**found: object) -> str:
    """What a layer has that only vLLM's kernels know, as a text; "" if nothing."""
    return ", ".join(name.replace("_", " ") for name, value in found.items() if value)

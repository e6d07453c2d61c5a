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
        split: Split,
        layer_idx: int,
        query: Tensor,
        output: Tensor,
        *,
        scale: float,
        keys_values: Callable[[Chunk], tuple[Tensor, Tensor]],
        rest: Callable[[slice | Tensor, Any, Tensor], object],
        everything: Callable[[], Tensor],
    ) -> Tensor:
        """Fill ``output``.

        Args:
            split: of the batch.
            layer_idx: the layer.
            query: ``[T, Hq, D]``, all requests one behind the other.
            output: ``[T, Hq, D]``.
            scale: factor of the logits.
            keys_values: all keys and values that a chunk sees, ``[Nk, Hkv, D]`` each.
            rest: computes rows with the metadata of the rest, into a tensor of their size.
            everything: computes the whole batch densely.
        """
        counter = COUNTERS.layer(layer_idx)
        counter.add_dense(split.dense)
        reason = self.reason_to_run_dense(layer_idx)
        if reason or not split.chunks:
            if reason:
                counter.add_dense({reason: len(split.chunks)})
            return everything()
        for chunk in split.chunks:
            keys, values = keys_values(chunk)
            q, k, v = (x.transpose(0, 1)[None] for x in (query[chunk.rows], keys, values))
            out = self.method(
                q, k, v, scale=scale, layer_idx=layer_idx, recorder=counter.add_record
            )
            output[chunk.rows] = out[0].transpose(0, 1)
        if split.rest is not None and split.rest_rows is not None:
            rows = split.rest_rows
            if isinstance(rows, slice):
                rest(rows, split.rest, output[rows])
            else:
                part = torch.empty_like(output[rows])
                rest(rows, split.rest, part)
                output[rows] = part
        COUNTERS.write_sometimes()
        return output


def reasons(**found: object) -> str:
    """What a layer has that only vLLM's kernels know, as a text; "" if nothing."""
    return ", ".join(name.replace("_", " ") for name, value in found.items() if value)

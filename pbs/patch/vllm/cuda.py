"""vLLM's FlashAttention backend with sparse prefill: ``--attention-backend CUSTOM``."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from pbs.methods.base import AttentionMethod
from pbs.patch.vllm.batch import Split, split_batch
from pbs.patch.vllm.layer import SparseLayer, reasons
from pbs.patch.vllm.settings import ServingSettings


class SparseFlashBackend(FlashAttentionBackend):
    """The backend CUSTOM."""

    @staticmethod
    def get_name() -> str:
        """A member of vLLM's enumeration, which looks it up."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type:
        """See the base class."""
        return SparseFlashLayer

    @staticmethod
    def get_builder_cls() -> type:
        """See the base class."""
        return SparseFlashBuilder


class SparseFlashBuilder(FlashAttentionMetadataBuilder):
    """Metadata of the whole batch, and in its attribute ``pbs`` the split of it.

    Captured graphs replay decoding steps alone: a captured prefill would replay one selection.
    """

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.pbs = ServingSettings.of(vllm_config)
        self.pbs_min_queries = 0 if self.pbs is None else self.pbs.build().decode_below
        parallel = vllm_config.parallel_config
        sizes = ("decode_context_parallel_size", "prefill_context_parallel_size")
        if self.pbs is not None and any(getattr(parallel, name, 1) > 1 for name in sizes):
            raise NotImplementedError(
                "pbs: a process has a part of the keys only under context parallelism; use tensor "
                "parallelism, or leave pbs out"
            )

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        """Never: a cascade computes the common prefix of requests apart (vLLM to 0.26)."""
        del args, kwargs
        return False

    @classmethod
    def get_cudagraph_support(cls, *args: Any, **kwargs: Any) -> Any:
        """Of this class, whatever FlashAttention's version allows."""
        del args, kwargs
        return cls._cudagraph_support

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        """See the base class."""
        whole = super().build(common_prefix_len, common_attn_metadata, fast_build)
        whole.pbs = None
        if self.pbs is None:
            return whole
        if _is_special(common_attn_metadata):
            whole.pbs = Split([], {"a mask that is not causal": common_attn_metadata.num_reqs})
            return whole
        split, rest = split_batch(
            common_attn_metadata, min_keys=self.pbs.min_keys, min_queries=self.pbs_min_queries
        )
        if split is not None and rest is not None:
            if whole.scheduler_metadata is not None:  # in a buffer that the next build overwrites
                whole.scheduler_metadata = whole.scheduler_metadata.clone()
            split.rest = super().build(0, rest, fast_build)
        whole.pbs = split
        return whole

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """Without a split: what is captured are decoding steps."""
        settings, self.pbs = self.pbs, None
        try:
            return super().build_for_cudagraph_capture(common_attn_metadata)
        finally:
            self.pbs = settings

    def update_block_table(self, metadata: Any, blk_table: Tensor, slot_mapping: Tensor) -> Any:
        """See the base class: the same batch in another group's pages."""
        updated = super().update_block_table(metadata, blk_table, slot_mapping)
        split = getattr(metadata, "pbs", None)
        if split is not None and split.rest is not None:
            split = copy.copy(split)
            split.rest = copy.copy(split.rest)
            split.rest.block_table = blk_table[split.rest_requests]
            split.rest.slot_mapping = slot_mapping[split.rest_rows]
        updated.pbs = split
        return updated


class SparseFlashLayer(FlashAttentionImpl):
    """One layer; without settings it is vLLM's own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        settings = ServingSettings.of(config)
        self.pbs: SparseLayer | None = None
        self.pbs_max_keys = config.model_config.max_model_len
        if settings is not None:
            reason = reasons(
                no_causal_self_attention=self.attn_type != AttentionType.DECODER,
                sliding_window=tuple(self.sliding_window) != (-1, -1),
                soft_capping=self.logits_soft_cap,
                alibi=self.alibi_slopes is not None,
                attention_sinks=self.sinks is not None,
                quantised_cache=self.kv_cache_dtype not in ("auto", "bfloat16", "float16"),
            )
            self.pbs = SparseLayer(settings, reason)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """See the base class."""
        stock = super().forward
        scales = (output_scale, output_block_scale)
        if attn_metadata is None and self.pbs is not None and not self.pbs.reason:
            heads = gathered_heads(self.pbs.method, self.num_heads, self.num_kv_heads)
            # In vLLM's profiling run, or the cache gets the memory.
            torch.empty(
                (self.pbs_max_keys, heads, self.head_size), dtype=query.dtype, device=query.device
            )
        if self.pbs is None or getattr(attn_metadata, "pbs", None) is None:
            return stock(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
        return self.pbs.forward(
            attn_metadata,
            extract_layer_index(layer.layer_name),
            query,
            key,
            value,
            output,
            scale=self.scale,
            pages=lambda chunk: read_pages(
                kv_cache, attn_metadata.block_table[chunk.request], chunk.num_keys
            ),
            dense=lambda rows, metadata, out: stock(
                layer, query[rows], key[rows], value[rows], kv_cache, metadata, out, *scales
            ),
        )


def gathered_heads(method: AttentionMethod, num_heads: int, num_kv_heads: int) -> int:
    """Heads of keys and values that a call holds beside the cache: of pages, and in their order.

    Args:
        method: the layer's.
        num_heads: Hq.
        num_kv_heads: Hkv.
    """
    facts = method.facts
    if facts is None or not facts.moves_keys:
        return 2 * num_kv_heads
    is_shared = getattr(method, "gqa", "") == "shared"
    return 2 * num_kv_heads + 2 * (num_kv_heads if is_shared else num_heads)


def read_pages(kv_cache: Tensor, block_table: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one request, ``[Nk, Hkv, D]`` each.

    Args:
        kv_cache: ``[pages, Hkv, block, 2 D]``, whatever its strides.
        block_table: pages of the request, in order.
        num_keys: Nk.
    """
    count = -(-num_keys // kv_cache.shape[2])
    pages = kv_cache.index_select(0, block_table[:count].long()).transpose(1, 2).flatten(0, 1)
    keys, values = pages[:num_keys].chunk(2, dim=-1)
    return keys, values


def _is_special(common: Any) -> bool:
    """Whether the batch's masks are more than causal."""
    if getattr(common, "mm_req_doc_ranges", None):
        return True
    return getattr(common, "rswa_prefix_lens", None) is not None

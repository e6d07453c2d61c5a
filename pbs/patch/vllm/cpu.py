"""vLLM's CPU backend with sparse prefill."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from pbs.patch.vllm.batch import split_batch
from pbs.patch.vllm.layer import SparseLayer, reasons
from pbs.patch.vllm.settings import ServingSettings

# Base of the two digits that number the elements of a page: bf16 holds integers up to it exactly.
BASE = 256


class SparseCPUBackend(CPUAttentionBackend):
    """Stands in for ``CPU_ATTN``."""

    @staticmethod
    def get_impl_cls() -> type:
        """See the base class."""
        return SparseCPULayer

    @staticmethod
    def get_builder_cls() -> type:
        """See the base class."""
        return SparseCPUBuilder


class SparseCPUBuilder(CPUAttentionMetadataBuilder):
    """Metadata of the whole batch, and in its attribute ``pbs`` the split of it."""

    def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.pbs = ServingSettings.of(vllm_config)
        self.pbs_min_queries = 0 if self.pbs is None else self.pbs.build().decode_below

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        """See the base class."""
        whole = super().build(common_prefix_len, common_attn_metadata, fast_build)
        whole.pbs = None
        if self.pbs is None or self.is_cross_attention or self.is_encoder_only_attention:
            return whole
        split, rest = split_batch(
            common_attn_metadata, min_keys=self.pbs.min_keys, min_queries=self.pbs_min_queries
        )
        if split is not None and rest is not None:
            split.rest = super().build(0, rest, fast_build)
        whole.pbs = split
        return whole


class SparseCPULayer(CPUAttentionBackendImpl):
    """One layer; without settings it is vLLM's own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = ServingSettings.of(get_current_vllm_config())
        self.pbs: SparseLayer | None = None
        if settings is not None:
            reason = reasons(
                no_causal_self_attention=self.attn_type != AttentionType.DECODER,
                sliding_window=self.sliding_window != -1,
                soft_capping=self.logits_soft_cap,
                alibi=self.alibi_slopes is not None,
                attention_sinks=self.sinks is not None,
                quantised_cache=self.is_fp8_kv_cache,
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
        if self.pbs is None or getattr(attn_metadata, "pbs", None) is None:
            return stock(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
        isa = getattr(layer, "isa", None) or self.isa  # vLLM 0.28 keeps it in this class
        return self.pbs.forward(
            attn_metadata,
            extract_layer_index(layer.layer_name),
            query,
            key,
            value,
            output,
            scale=self.scale,
            pages=lambda chunk: read_pages(
                kv_cache, attn_metadata.block_table[chunk.request], chunk.num_keys, isa
            ),
            dense=lambda rows, metadata, out: stock(
                layer, query[rows], key[rows], value[rows], kv_cache, metadata, out, *scales
            ),
        )


def read_pages(
    kv_cache: Tensor, block_table: Tensor, num_keys: int, isa: str
) -> tuple[Tensor, Tensor]:
    """Keys and values of one request, ``[Nk, Hkv, D]`` each.

    Args:
        kv_cache: ``[pages, Hkv, block, 2 D]``.
        block_table: pages of the request, in order.
        num_keys: Nk.
        isa: which of vLLM's kernels wrote the pages; each packs them its own way.
    """
    _, num_heads, size, width = kv_cache.shape
    count = -(-num_keys // size)
    pages = kv_cache[block_table[:count].long()].reshape(count, num_heads, 2, size * width // 2)
    found = []
    for part, places in enumerate(page_layout(isa, size, width // 2, kv_cache.dtype)):
        elements = pages[:, :, part, places].reshape(count, num_heads, size, width // 2)
        found.append(elements.transpose(1, 2).flatten(0, 1)[:num_keys])
    return found[0], found[1]


@lru_cache(maxsize=8)
def page_layout(isa: str, size: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Where element (token, d) of a head lies in a page: for keys, and for values, int64.

    The kernels pack pages for their instruction set and say nowhere how. So one of them writes a
    page whose elements are numbers, their own in two digits, and it is read where they went.

    Raises:
        NotImplementedError: pages are too large to number, or elements are lost.
    """
    count = size * head_dim
    if count > BASE * BASE:
        raise NotImplementedError(
            f"pages of {size} tokens of {head_dim} are too large; choose a smaller block_size"
        )
    numbers = torch.arange(count)
    seen = torch.zeros(2, count, dtype=torch.int64)
    for digit, worth in ((numbers % BASE, 1), (numbers // BASE, BASE)):
        page = torch.zeros(1, 1, 2 * size, head_dim, dtype=dtype)
        source = digit.to(dtype).view(size, 1, head_dim)
        ops.cpu_attn_reshape_and_cache(
            source,
            source.clone(),
            *page.chunk(2, dim=2),
            torch.arange(size),
            isa,
            k_scale=1.0,
            v_scale=1.0,
            kv_cache_dtype="auto",
        )
        seen += worth * page.view(2, count).long()
    for part in seen:
        if not torch.equal(part.sort().values, numbers):
            raise NotImplementedError(
                f"vLLM's {isa!r} kernel writes pages that cannot be read back"
            )
    keys, values = seen.argsort(dim=1)
    return keys, values

"""vLLM's names that the plug-in uses, with eager paged attention behind them."""

import sys
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

HEADS, KV_HEADS, HEAD_DIM, PAGE = 4, 2, 32, 16
SCALE = HEAD_DIM**-0.5


@dataclass
class Common:
    """vLLM's CommonAttentionMetadata, as far as it is used."""

    query_start_loc: Any
    query_start_loc_cpu: Any
    seq_lens: Any
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: Any
    slot_mapping: Any
    causal: Any = True
    is_prefilling: Any = None
    seq_lens_cpu_upper_bound: Any = None
    positions: Any = None
    mm_req_doc_ranges: Any = None
    rswa_prefix_lens: Any = None
    _num_computed_tokens_cache: Any = None
    _token_to_req_indices_cache: Any = None

    def replace(self, **changes):
        return replace(self, **changes)


class Builder:
    """Metadata of a batch."""

    is_cross_attention = is_encoder_only_attention = False

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        self.vllm_config = vllm_config

    def schedule(self, num_reqs):
        return torch.tensor(num_reqs)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        common = common_attn_metadata
        return SimpleNamespace(
            num_actual_tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            scheduler_metadata=self.schedule(common.num_reqs),
        )

    def build_for_cudagraph_capture(self, common_attn_metadata):
        return self.build(0, common_attn_metadata)

    def update_block_table(self, metadata, blk_table, slot_mapping):
        new = SimpleNamespace(**vars(metadata))
        new.block_table, new.slot_mapping = blk_table, slot_mapping
        return new


class FlashBuilder(Builder):
    """All its builds write one buffer."""

    buffer = torch.zeros((), dtype=torch.int64)

    def schedule(self, num_reqs):
        return self.buffer.fill_(num_reqs)


class Layer:
    """Paged causal attention of every request."""

    unpack = staticmethod(lambda pages: pages)

    def __init__(self, *, sliding_window=None, sinks=None):
        self.num_heads, self.num_kv_heads, self.head_size = HEADS, KV_HEADS, HEAD_DIM
        self.scale, self.attn_type, self.kv_cache_dtype = SCALE, "decoder", "auto"
        self.sliding_window = self.no_window if sliding_window is None else sliding_window
        self.logits_soft_cap, self.alibi_slopes, self.sinks = 0, None, sinks
        self.is_fp8_kv_cache = False

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *scales):
        if attn_metadata is None:
            return output
        meta = attn_metadata
        assert int(meta.scheduler_metadata) == len(meta.seq_lens)
        assert len(query) == len(output) == meta.num_actual_tokens
        for i, length in enumerate(meta.seq_lens.tolist()):
            first, last = meta.query_start_loc[i : i + 2].tolist()
            pages = self.unpack(kv_cache[meta.block_table[i, : -(-length // PAGE)].long()])
            k, v = pages.transpose(1, 2).flatten(0, 1)[:length].chunk(2, dim=-1)
            k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1).transpose(0, 1) for x in (k, v))
            q = query[first:last].transpose(0, 1)
            hidden = ~torch.ones(last - first, length).tril(length - (last - first)).bool()
            logits = (q @ k.transpose(1, 2) * SCALE).masked_fill(hidden, float("-inf"))
            output[first:last] = (logits.softmax(-1) @ v).transpose(0, 1)
        return output


class FlashLayer(Layer):
    no_window = (-1, -1)


class CPULayer(Layer):
    """Its keys lie transposed in their half of a page, its values in order."""

    no_window = -1

    @staticmethod
    def unpack(pages):
        keys, values = pages.flatten(2).chunk(2, dim=-1)
        keys = keys.unflatten(-1, (HEAD_DIM, PAGE)).transpose(-1, -2)
        return torch.cat([keys, values.unflatten(-1, (PAGE, HEAD_DIM))], dim=-1)

    @staticmethod
    def pack(pages):
        keys, values = pages.chunk(2, dim=-1)
        both = torch.cat([keys.transpose(-1, -2).flatten(2), values.flatten(2)], dim=-1)
        return both.view(pages.shape)


class AttentionLayer:
    """What vLLM builds around an implementation."""

    def __init__(self, layer_name, attn_backend, impl):
        self.layer_name, self.attn_backend, self.impl = layer_name, attn_backend, impl


class LatentLayer:
    """Multi-head latent attention."""

    def __init__(self, layer_name):
        self.layer_name = layer_name

    def forward_impl(self, q, attn_metadata, output):
        return output.copy_(q)


def write_pages(key, value, key_cache, value_cache, slots, isa, **scales):
    """vLLM's op: tokens ``[T, 1, D]`` into the halves ``[1, 1, T, D]`` of one page."""
    assert isa == "stand-in"
    key_cache.copy_(key.permute(1, 2, 0).reshape(key_cache.shape))
    value_cache.copy_(value.permute(1, 0, 2).reshape(value_cache.shape))


class CounterMetricFamily:
    """Of prometheus_client: a name and samples with labels."""

    def __init__(self, name, documentation, labels):
        self.name, self.samples = name, {}

    def add_metric(self, labels, value):
        self.samples[tuple(labels)] = value


def install(monkeypatch, vllm_config):
    """Put the names into ``sys.modules`` until the test ends; returns what was registered."""
    registered = {}
    backend = SimpleNamespace(
        AttentionCGSupport=SimpleNamespace(UNIFORM_BATCH="uniform"),
        AttentionType=SimpleNamespace(DECODER="decoder"),
    )
    names = {
        "vllm": {},
        "prometheus_client": {"REGISTRY": SimpleNamespace(register=lambda collector: None)},
        "prometheus_client.core": {"CounterMetricFamily": CounterMetricFamily},
        "vllm._custom_ops": {"cpu_attn_reshape_and_cache": write_pages},
        "vllm.config": {"get_current_vllm_config": lambda: vllm_config},
        "vllm.model_executor.layers.attention": {
            "Attention": AttentionLayer,
            "MLAAttention": LatentLayer,
        },
        "vllm.model_executor.models.utils": {
            "extract_layer_index": lambda name: int(name.split(".")[2])
        },
        "vllm.v1.attention.backend": vars(backend),
        "vllm.v1.attention.backends.registry": {
            "AttentionBackendEnum": SimpleNamespace(CPU_ATTN="CPU_ATTN", CUSTOM="CUSTOM"),
            "register_backend": registered.__setitem__,
        },
        "vllm.v1.attention.backends.flash_attn": {
            "FlashAttentionBackend": object,
            "FlashAttentionImpl": FlashLayer,
            "FlashAttentionMetadataBuilder": FlashBuilder,
        },
        "vllm.v1.attention.backends.cpu_attn": {
            "CPUAttentionBackend": object,
            "CPUAttentionBackendImpl": CPULayer,
            "CPUAttentionMetadataBuilder": Builder,
        },
    }
    for name, members in names.items():
        for depth in range(1, name.count(".") + 1):
            parent = ".".join(name.split(".")[:depth])
            if parent not in names and parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            parent, _, child = name.rpartition(".")
            setattr(sys.modules.get(parent, module), child, module)
    return registered

"""Tiny random models of the families the plug-in must serve."""

import torch
from transformers import AutoModelForCausalLM as AutoModel
from transformers import (
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 128
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    # Larger than usual, so that attention is not nearly uniform.
    "initializer_range": 0.2,
}
WINDOW = 48
ALTERNATING = ["sliding_attention", "full_attention"]

CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral_sliding": MistralConfig(**SIZES, sliding_window=WINDOW),
    "phi3": Phi3Config(**SIZES),
    "gemma2": Gemma2Config(
        **SIZES,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        attn_logit_softcapping=2.0,
        layer_types=ALTERNATING,
    ),
    "gemma3": Gemma3TextConfig(
        **SIZES,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        layer_types=ALTERNATING,
    ),
    "gpt_oss": GptOssConfig(
        **SIZES,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        layer_types=ALTERNATING,
    ),
}
# Layers (of 2) that are plain causal attention, and why the others are dense.
SPARSE_LAYERS = {name: {0, 1} for name in CONFIGS} | {
    "mistral_sliding": set(),
    "gemma2": set(),
    "gemma3": {1},
    "gpt_oss": set(),
}
REASONS = {
    "mistral_sliding": {f"sliding window {WINDOW}"},
    "gemma2": {f"sliding window {WINDOW}, softcap", "softcap"},
    "gemma3": {f"sliding window {WINDOW}"},
    "gpt_oss": {f"sliding window {WINDOW}, attention sinks", "attention sinks"},
}


def make_model(name, *, attention="eager", **overrides):
    """A model of a family with fixed random weights, its own attention as asked for."""
    torch.manual_seed(0)
    config = CONFIGS[name].__class__(**{**CONFIGS[name].to_dict(), **overrides})
    model = AutoModel.from_config(config, attn_implementation=attention, dtype=torch.float32)
    return model.eval()


def make_hybrid():
    """A model of three layers of which only the second is attention."""
    layer_types = ["conv", "full_attention", "conv"]
    sizes = SIZES | {"num_hidden_layers": 3, "layer_types": layer_types, "conv_L_cache": 3}
    torch.manual_seed(0)
    return AutoModel.from_config(Lfm2Config(**sizes), attn_implementation="eager").float().eval()


def make_latent():
    """A model with multi-head latent attention, whose values are narrower than its keys."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    sizes |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    sizes |= {"first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32}
    sizes |= {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 24}
    torch.manual_seed(0)
    config = DeepseekV3Config(**sizes, vocab_size=VOCABULARY)
    return AutoModel.from_config(config, attn_implementation="eager").eval()


def random_ids(batch, length, seed=0):
    """Token ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def positions_of(mask):
    """Positions as generate() makes them from a padding mask."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)

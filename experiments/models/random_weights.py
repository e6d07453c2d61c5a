"""Models with random weights at a real architecture: for time and memory, never for accuracy.

Importable without hydra and wandb.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

# Architectures that are shipped: a config.json of transformers, nothing else.
ARCHITECTURES = Path(__file__).resolve().parents[1] / "architectures"


def build_random_model(
    source: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int = 0,
    changes: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """A causal language model whose weights are drawn as for training from scratch.

    Args:
        source: folder with a config.json, such as one of ``ARCHITECTURES``, or a name on the hub.
        dtype: of the weights.
        device: weights are drawn there: 8B take seconds on a GPU, minutes on a CPU.
        seed: of the draw.
        changes: entries of the architecture to change, such as a smaller number of layers.

    Returns:
        The model in evaluation mode.
    """
    config = AutoConfig.from_pretrained(source)
    for name, value in (changes or {}).items():
        if not hasattr(config, name):
            raise ValueError(f"the architecture of {source} has no entry {name!r} to change")
        setattr(config, name, value)
    return draw_model(config, dtype=dtype, device=device, seed=seed)


def draw_model(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int = 0,
) -> PreTrainedModel:
    """As :func:`build_random_model`, from a config that is loaded already."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def random_ids(
    vocab_size: int, length: int, *, device: torch.device | str, seed: int = 0
) -> torch.Tensor:
    """Token ids ``[1, length]``, evenly drawn."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (1, length), generator=generator).to(device)

"""Loads the model under test, once per process."""

from __future__ import annotations

import inspect
import json
import logging
import sys
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from experiments.config import ROOT, ConfigError, ModelConfig
from experiments.console import CONSOLE
from experiments.distributed import check_tensor_parallel
from experiments.random_weights import draw_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        model: in evaluation mode, on its device.
        tokenizer: its tokenizer; None for random weights without one.
        max_length: longest prompt plus answer, in tokens.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    max_length: int

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.model.device

    def synchronise(self) -> None:
        """Wait for the device, before reading a clock."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def load_model(config: ModelConfig) -> LoadedModel:
    """Load a model; the one loaded last is kept for the next cell of a sweep.

    Raises:
        ConfigError: no such folder, no such name on the hub, no safetensors, or a wrong dtype or
            device.
    """
    return _load(json.dumps(asdict(config), sort_keys=True))


@lru_cache(maxsize=1)
def _load(key: str) -> LoadedModel:
    config = ModelConfig(**json.loads(key))
    check_tensor_parallel(config.tp)
    source = resolve_path(config.source)
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    logger.info("loading %s", config.source)
    if not CONSOLE.is_terminal:
        disable_progress_bar()
    dtype, device = _dtype(config), _device(config)
    try:
        architecture = AutoConfig.from_pretrained(source, **options)
        _change(architecture, config.config or {})
        if config.weights == "random":
            return _draw(config, architecture, dtype, device)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            config=architecture,
            dtype=dtype,
            device_map=config.device_map,
            use_safetensors=True,
            **(_tensor_parallel() if config.tp else {}),
            **options,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(_explain(config, error)) from error
    if config.device_map is None and not config.tp:
        model = model.to(device)
    limit = config.max_length or getattr(architecture, "max_position_embeddings", None)
    if limit is None:
        raise ConfigError(f"{config.path} states no longest prompt; add model.max_length=...")
    return LoadedModel(model.eval(), tokenizer, limit)


def _draw(
    config: ModelConfig, architecture: Any, dtype: str | torch.dtype, device: torch.device
) -> LoadedModel:
    """The architecture with random weights, and its tokenizer if there is one."""
    if config.tp or config.device_map is not None:
        raise ConfigError(
            "model.weights=random draws the whole model on one device; leave out model.tp and "
            "model.device_map"
        )
    if dtype == "auto":
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = draw_model(architecture, dtype=dtype, device=device)
    tokenizer = None
    if (Path(resolve_path(config.source)) / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(resolve_path(config.source))
    # RoPE has an angle for any position, and the weights mean nothing: any length can be timed.
    return LoadedModel(model, tokenizer, config.max_length or sys.maxsize)


def resolve_path(path: str) -> str:
    """A local folder, absolute, or a name on the hub as it stands.

    Raises:
        ConfigError: it can only be a folder, and there is none.
    """
    for folder in (Path(path).expanduser(), ROOT / path):
        if (folder / "config.json").is_file():
            return str(folder.resolve())
        if folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(
                f"model.path={path} is a folder without config.json; expected a checkpoint in the "
                "layout of transformers (config.json, *.safetensors, tokenizer files)"
            )
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ConfigError(
            f"model.path={path}: no such folder. Give a folder with config.json, *.safetensors and "
            "tokenizer files, or a name on the hub such as Qwen/Qwen3-8B"
        )
    return path


def _tensor_parallel() -> dict[str, Any]:
    """The option that shards a model over the processes, in any version's words."""
    try:
        from transformers.distributed import DistributedConfig
    except ImportError:
        return {"tp_plan": "auto"}
    if "tp_plan" not in inspect.signature(DistributedConfig).parameters:
        return {"tp_plan": "auto"}
    return {"distributed_config": DistributedConfig(tp_plan="auto")}


def _dtype(config: ModelConfig) -> str | torch.dtype:
    if config.dtype == "auto":
        return "auto"
    dtype = getattr(torch, config.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(
            f"model.dtype={config.dtype} is no floating-point dtype of torch; expected auto, "
            "float32, bfloat16 or float16"
        )
    return dtype


def _device(config: ModelConfig) -> torch.device:
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise ConfigError(f"model.device={config.device} is no device of torch") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"model.device={config.device}, but torch sees no GPU; try cpu")
    return device


def _change(architecture: Any, changes: dict[str, Any]) -> None:
    """Overwrite entries of the checkpoint's own config."""
    for key, value in changes.items():
        # transformers 5 keeps what version 4 calls rope_scaling together with the RoPE base.
        if key == "rope_scaling" and getattr(architecture, "rope_parameters", None) is not None:
            architecture.rope_parameters = {**architecture.rope_parameters, **value}
        elif hasattr(architecture, key):
            setattr(architecture, key, value)
        else:
            raise ConfigError(f"model.config.{key}: the model's config has no such entry")


def _explain(config: ModelConfig, error: Exception) -> str:
    return (
        f"could not load model.path={config.path}: {error}\nLooked for a folder of that name here "
        "and in the project, then for the name on the Hugging Face hub. Without network, "
        "download the checkpoint (safetensors) and give its folder as model.path; gated models "
        "need `hf auth login` first; model code of its own needs model.trust_remote_code=true."
    )

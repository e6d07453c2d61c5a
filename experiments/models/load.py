"""Loads the model under test, once per process."""

from __future__ import annotations

import json
import logging
import os
import re
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

from experiments.cached_models import PREFIX, cached_model
from experiments.memory import (
    release_memory,
)
from experiments.models.checkpoints import (
    check_json_files,
    check_loaded,
    check_tokenizer,
    check_tokenizer_files,
    check_weight_files,
    explained,
)
from experiments.models.distributed import check_tensor_parallel
from experiments.models.gguf import SUFFIX, converted
from experiments.models.random_weights import draw_model
from experiments.models.tensor_parallel import check_heads, shard_model, sharding_options
from experiments.settings.config import ROOT, ConfigError, ModelConfig
from experiments.settings.console import CONSOLE
from experiments.settings.groups import DEVICE
from experiments.settings.ranks import num_ranks
from pbs.ops.inputs import FLOAT_DTYPES

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
    dtype, device = _dtype(config), resolve_device(config.device, "model.device")
    check_json_files(source)
    with explained(config.source, "config.json"):
        architecture = AutoConfig.from_pretrained(source, **options)
        _change(architecture, config.config or {})
        if config.rope_factor is not None:
            stretch_positions(architecture, config.rope_factor, config.source)
    if config.tp:
        _check_ranks(architecture)
    if config.weights == "random":
        return _draw(config, architecture, dtype, device)
    check_weight_files(source)
    tokenizer = _load_tokenizer(config, source)
    with explained(config.source, "weights"):
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            config=architecture,
            dtype=dtype,
            device_map=config.device_map,
            use_safetensors=True,
            output_loading_info=True,
            **(sharding_options() if config.tp else {}),
            **options,
        )
    check_loaded(model, info, config.source, is_changed=bool(config.config))
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
    if config.device_map is not None:
        raise ConfigError(
            "model.weights=random draws the whole model on one device; leave out model.device_map, "
            "or share the model over processes with model.tp=true"
        )
    if dtype == "auto":
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with explained(config.source, "config.json"):
        model = draw_model(architecture, dtype=dtype, device=device)
    if config.tp:
        model = shard_model(model)
        release_memory(collects=True)  # of the whole model
    tokenizer = None
    if (Path(resolve_path(config.source)) / "tokenizer_config.json").is_file():
        tokenizer = _load_tokenizer(config, resolve_path(config.source))
    # RoPE has an angle for any position, and the weights mean nothing: any length can be timed.
    return LoadedModel(model, tokenizer, config.max_length or sys.maxsize)


def _load_tokenizer(config: ModelConfig, source: str) -> PreTrainedTokenizerBase:
    check_tokenizer_files(source)
    with explained(config.source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=config.trust_remote_code
        )
    check_tokenizer(tokenizer, config.source)
    return tokenizer


def _check_ranks(architecture: Any) -> None:
    try:
        check_heads(architecture, num_ranks())
    except ValueError as error:
        raise ConfigError(str(error)) from error


def resolve_path(path: str) -> str:
    """A local folder, absolute, or a name on the hub as it stands.

    Raises:
        ConfigError: it can only be a folder, and there is none.
    """
    if path.startswith(PREFIX):
        return str(cached_model(path))
    if path.endswith(SUFFIX) and Path(path).expanduser().is_file():
        return str(converted(Path(path).expanduser()))
    for folder in (Path(os.path.expanduser(path)), ROOT / path):
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
            "tokenizer files, a GGUF file, or a name on the hub such as Qwen/Qwen3-8B"
        )
    return path


def _dtype(config: ModelConfig) -> str | torch.dtype:
    if config.dtype == "auto":
        return "auto"
    dtype = getattr(torch, config.dtype, None)
    if dtype not in FLOAT_DTYPES:
        raise ConfigError(
            f"model.dtype={config.dtype} is no floating-point dtype that attention is computed in; "
            "expected auto, float32, bfloat16, float16 or float64"
        )
    return dtype


def resolve_device(name: str, setting: str) -> torch.device:
    """The device of this name; "auto" is a GPU if there is one.

    Args:
        name: auto, cpu, cuda or cuda:N.
        setting: what the user set to it, for error messages.

    Raises:
        ConfigError: another name, or a GPU that is not there.
    """
    if not re.fullmatch(DEVICE, name):
        raise ConfigError(f"{setting}={name}: expected auto, cpu, cuda or cuda:N")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ConfigError(f"{setting}={name}, but torch sees no GPU; try cpu")
    num_gpus = torch.cuda.device_count()
    if device.index is not None and device.index >= num_gpus:
        raise ConfigError(
            f"{setting}={name}, but there are {num_gpus} GPUs: the last is cuda:{num_gpus - 1}"
        )
    return device


def stretch_positions(architecture: Any, factor: float, source: str) -> None:
    """Scale a model's rotary positions by YaRN, and with them how many it takes.

    Raises:
        ConfigError: it has no rotary positions, or they are scaled already.
    """
    trained = getattr(architecture, "max_position_embeddings", None)
    known = getattr(architecture, "rope_parameters", None)
    scaling = known or getattr(architecture, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    has_rope = known is not None or hasattr(architecture, "rope_theta")
    if trained is None or not has_rope or kind != "default":
        raise ConfigError(
            f"model.rope_factor={factor:g}: {source} has no rotary positions of the plain kind to "
            f"scale (rope type {kind!r}, {trained} positions); leave model.rope_factor out"
        )
    yarn = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": trained,
    }
    _change(architecture, {"rope_scaling": yarn})
    architecture.max_position_embeddings = int(factor * trained)


def _change(architecture: Any, changes: dict[str, Any]) -> None:
    """Overwrite entries of the checkpoint's own config."""
    for key, value in changes.items():
        # transformers 5 keeps what version 4 calls rope_scaling together with the RoPE base.
        if key == "rope_scaling" and not isinstance(value, dict | None):
            raise ConfigError(f"model.config.rope_scaling must be a mapping, got {value!r}")
        if key == "rope_scaling" and getattr(architecture, "rope_parameters", None) is not None:
            architecture.rope_parameters = {**architecture.rope_parameters, **(value or {})}
        elif hasattr(architecture, key):
            setattr(architecture, key, value)
        else:
            raise ConfigError(f"model.config.{key}: the model's config has no such entry")

"""Checkpoints in one GGUF file: dequantised once into the cache, then loaded like all others.

What transformers reads of them are Llama, Qwen2, Qwen3 and a few more. What runs are the numbers
that the quantised weights stand for, in float32: no speed and no memory is won by the quantisation.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from experiments.cached_models import cache_folder
from experiments.content import file_digest
from experiments.errors import ConfigError

logger = logging.getLogger(__name__)

SUFFIX = ".gguf"


def check_installed() -> None:
    """Raise ConfigError without the package that reads GGUF."""
    if find_spec("gguf") is None:
        raise ConfigError("reading a GGUF checkpoint needs gguf: pip install -e '.[real]'")


def converted(gguf: Path) -> Path:
    """Folder with the checkpoint as float32 safetensors, converted unless it is there.

    Raises:
        ConfigError: gguf is missing, or transformers cannot read the file.
    """
    folder = cache_folder() / "models" / f"gguf-{file_digest(gguf)}"
    if folder.is_dir():
        return folder
    check_installed()
    logger.info("%s: dequantised once to float32, in %s", gguf.name, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as scratch:
        part = Path(scratch) / "converted"
        try:
            convert(gguf, part)
        except Exception as error:  # whatever transformers and gguf raise on files they cannot read
            raise ConfigError(
                f"model.path={gguf}: transformers cannot read this GGUF ({type(error).__name__}: "
                f"{error}); expected a Llama, Qwen2 or Qwen3 checkpoint"
            ) from error
        part.rename(folder)
    return folder


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF as float32 safetensors with config and tokenizer, dequantised."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, **_unpacked(), dtype=torch.float32)
    config = AutoConfig.from_pretrained(**source)
    config.dtype = torch.float32
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # Weights that were quantised refuse to be saved; the same numbers in a plain model do not.
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(quantised.state_dict())
    plain.generation_config = quantised.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def _unpacked() -> dict[str, object]:
    """Ask for plain weights, in the words of the transformers that is installed."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}

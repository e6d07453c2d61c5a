"""What a checkpoint must be to give right numbers: checked when it is loaded, explained if not."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.settings.failures import is_exhausted
from experiments.settings.groups import ConfigError

logger = logging.getLogger(__name__)

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.msgpack", "*.h5")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
# Files that are JSON objects; others, such as vocab.json, are read by one kind of tokenizer only.
OBJECTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
_PROBE = "question"
_NUM_NAMED = 3
_LONGEST = 300


def check_weight_files(path: str) -> None:
    """Refuse a local checkpoint without safetensors; names on the hub are looked up later.

    Raises:
        ConfigError: no weights, or only in a format that runs code when it is read.
    """
    folder = Path(path)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise ConfigError(
            f"model.path={path} has its weights in {_some(pickles)}: reading a pickle can run any "
            "code, so only safetensors are read; convert them where you trust them, with "
            "transformers' save_pretrained"
        )
    if not any(folder.glob("*.safetensors.index.json")):
        raise ConfigError(
            f"model.path={path} has no weights: expected *.safetensors beside config.json (for "
            "random weights add model.weights=random)"
        )


def check_tokenizer_files(path: str) -> None:
    """Refuse a local checkpoint without a tokenizer.

    Raises:
        ConfigError: naming the files that are expected.
    """
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(
            f"model.path={path} has no tokenizer: expected one of {', '.join(TOKENIZER_FILES)} "
            "beside config.json; save the model's tokenizer there with save_pretrained"
        )


def check_json_files(path: str) -> None:
    """Check that the JSON files of a local checkpoint are objects.

    Raises:
        ConfigError: naming the file and where it breaks.
    """
    folder = Path(path)
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        if file.name not in OBJECTS and not file.name.endswith(".index.json"):
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{file.name} of model.path={path} is no JSON in UTF-8 ({error}); copy it again "
                "from where the checkpoint comes from"
            ) from error
        if not isinstance(content, dict):
            raise ConfigError(
                f"{file.name} of model.path={path} must be a JSON object, got a "
                f"{type(content).__name__}; copy it again from where the checkpoint comes from"
            )


@contextmanager
def explained(path: str, part: str) -> Iterator[None]:
    """Turn whatever transformers raises about a checkpoint into one line.

    Args:
        path: as the user gave it.
        part: what is loaded: "config.json", "tokenizer", "weights".

    Raises:
        ConfigError: what was wrong with the part. Running out of memory or disk stays what it is.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # a checkpoint is somebody's data: it can be wrong in any way
        if is_exhausted(error):
            raise
        raise ConfigError(_explain(path, part, error)) from error


def _explain(path: str, part: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return (
            f"model.path={path} needs Python code of its own for its {part}, which is not run "
            "unless you ask for it: read that code, then add model.trust_remote_code=true"
        )
    if "ignore_mismatched_sizes" in text:
        text = "tensors have other shapes than config.json says (the report above names them)"
    elif "Unrecognized configuration class" in text:
        text = "its model type is no causal language model of transformers"
    elif isinstance(error, KeyError):
        text = f"transformers knows nothing called {error}"
    elif not isinstance(error, OSError | ValueError | ImportError):
        text = f"{type(error).__name__}: {text}"
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}..."
    if Path(path).expanduser().exists() or part != "config.json":
        advice = "expected a checkpoint as transformers' save_pretrained writes it"
    else:
        advice = (
            "there is no folder of that name here or in the project, so it was looked up on the "
            "Hugging Face hub. Without network, download the checkpoint (safetensors) and give its "
            "folder; gated models need `hf auth login`"
        )
    return f"could not load the {part} of model.path={path}: {text}; {advice}"


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Check that a chat template renders a user's turn, and with it what was asked.

    Raises:
        ConfigError: the template fails, or loses the question.
    """
    if not tokenizer.chat_template:
        return
    turn = [{"role": "user", "content": _PROBE}]
    with explained(path, "chat template"):
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    if _PROBE not in text:
        raise ConfigError(
            f"the chat template of model.path={path} loses the user's text; correct "
            "chat_template.jinja, or remove it for prompts without one"
        )


def check_loaded(
    model: PreTrainedModel, info: Mapping[str, Any], path: str, *, is_changed: bool
) -> None:
    """Refuse a model that is not what its checkpoint holds: transformers only warns.

    Args:
        model: the loaded model.
        info: transformers' ``output_loading_info``.
        path: as the user gave it.
        is_changed: whether the user changes the checkpoint's config, such as its number of layers.

    Raises:
        ConfigError: weights that the checkpoint does not have, which would be random numbers, or
            layers that would be left out.
    """
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise ConfigError(
            f"the weights of model.path={path} lack {len(missing)} tensors that config.json asks "
            f"for ({_some(missing)}): they would be random; the checkpoint is incomplete, or "
            "config.json or model.config is another model's"
        )
    unused = sorted(info.get("unexpected_keys") or ())
    left_out = [name for name in unused if _layer_of(name) >= _num_layers(model)]
    if left_out and not is_changed:
        raise ConfigError(
            f"the weights of model.path={path} have layers that config.json leaves out "
            f"({_some(left_out)}): correct its num_hidden_layers"
        )
    if unused:
        logger.warning(
            "%d tensors of model.path=%s are not used (%s): config.json does not ask for them",
            len(unused),
            path,
            _some(unused),
        )
    ends = model.generation_config.eos_token_id if model.generation_config else None
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(end) is int for end in ends):
        raise ConfigError(
            f"generation_config.json of model.path={path}: eos_token_id must be an integer or a "
            f"list of integers, got {ends}"
        )


def _layer_of(name: str) -> int:
    """Number of the layer a tensor belongs to; -1 for those of none."""
    found = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _num_layers(model: PreTrainedModel) -> int:
    return model.config.get_text_config().num_hidden_layers


def _some(names: Sequence[str]) -> str:
    """The first few names."""
    rest = len(names) - _NUM_NAMED
    return ", ".join(names[:_NUM_NAMED]) + (f" and {rest} more" if rest > 0 else "")

"""What a run is made of: the typed configuration, its identity and its folder.

The parameters of a method or a bench, and their defaults, are the fields of its own dataclass; the
schema that Hydra checks overrides against is generated from it.
"""

from __future__ import annotations

import hashlib
import json
import re
import types
from collections.abc import Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
MODES = ("offline", "online", "disabled")  # of W&B
DENSE = "flash"  # the method that every other is compared with


class ConfigError(ValueError):
    """A setting is missing or wrong; the message says which and what to do."""


@dataclass
class ModelConfig:
    """A causal language model.

    Attributes:
        name: folder name in the results; default: last part of ``path``.
        path: local folder, or name on the hub. A relative folder may also be relative to the
            project's root.
        dtype: "auto" (as stored) or a dtype of torch ("bfloat16").
        device: "auto" (CUDA if there is one), "cpu", "cuda", "cuda:1"...
        device_map: passed to transformers ("auto" spreads over GPUs); replaces ``device``.
        max_length: longest prompt plus answer; default: what the model's own config says.
        trust_remote_code: run Python code that comes with the checkpoint.
        config: entries of the checkpoint's own config to change, such as its RoPE scaling.
        checkpoint: digest of a local checkpoint, filled in: another one under the same path is
            another run.
    """

    name: str | None = None
    path: str = MISSING
    dtype: str = "auto"
    device: str = "auto"
    device_map: Any = None
    max_length: int | None = None
    trust_remote_code: bool = False
    config: Any = None
    checkpoint: str | None = None


@dataclass
class LoggerConfig:
    """Tracking. Results are on disk first; this mirrors them.

    Attributes:
        name: "wandb".
        mode: "offline", "online" or "disabled".
        project: W&B project.
        entity: W&B account or team; default: the account's own.
    """

    name: str = "wandb"
    mode: str = "offline"
    project: str = "pbs-attn"
    entity: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"logger.mode={self.mode}: expected one of {', '.join(MODES)}")


@dataclass
class PathsConfig:
    """Where things are written.

    Attributes:
        outputs: root of all run folders.
        wandb: W&B's own files go to a folder ``wandb`` in there.
    """

    outputs: str = "outputs"
    wandb: str = "${paths.outputs}"


@dataclass
class RunConfig:
    """One cell: a model, a method, a bench.

    Attributes:
        model: see :class:`ModelConfig`.
        method: "name" and the method's parameters.
        bench: "name" and the bench's parameters.
        logger: see :class:`LoggerConfig`.
        paths: see :class:`PathsConfig`.
        seed: seed of everything random.
        check: run the safety gate before measuring.
        resume: continue an interrupted run and skip a finished one; false starts again.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    method: Any = MISSING
    bench: Any = MISSING
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    seed: int = 0
    check: bool = True
    resume: bool = True

    @classmethod
    def from_hydra(cls, cfg: DictConfig) -> RunConfig:
        """Resolve what Hydra composed.

        Raises:
            ConfigError: a mandatory setting has no value.
        """
        try:
            tree = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        except MissingMandatoryValue as error:
            key = error.full_key
            raise ConfigError(f"{key} needs a value: add {key}=... to the command") from error
        run = cls.from_dict(tree)
        run.model.checkpoint = checkpoint_digest(run.model.path)
        return run

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> RunConfig:
        """Rebuild from plain data, as in a run's ``config.yaml``."""
        typed = {"model": ModelConfig, "logger": LoggerConfig, "paths": PathsConfig}
        groups = {key: group(**tree[key]) for key, group in typed.items()}
        return cls(**{**tree, **groups})

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @property
    def model_name(self) -> str:
        """Name of the model in folders and tables."""
        name = self.model.name or Path(self.model.path).name
        return re.sub(r"[^\w.-]+", "_", name)

    @property
    def hash(self) -> str:
        """Identity of the run: of everything that can change its result, and of nothing else."""
        return _digest(self._identity())

    @property
    def sample_set(self) -> str:
        """Identity of what is asked, whatever the method: runs that share it can be paired."""
        return _digest({**self._identity(), "method": None})

    @property
    def group(self) -> Path:
        """Folder of all runs of this bench and model."""
        return Path(self.paths.outputs) / self.bench["name"] / self.model_name

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.group / self.method["name"] / self.hash

    def _identity(self) -> dict[str, Any]:
        model = {key: value for key, value in asdict(self.model).items() if key != "name"}
        if model["checkpoint"] is None:  # on the hub, where the name says which
            del model["checkpoint"]
        return {"model": model, "method": self.method, "bench": self.bench, "seed": self.seed}


def parameters(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a method's or bench's settings: all but the name."""
    return {key: value for key, value in settings.items() if key != "name"}


def make_schema(target: type, name: str) -> type:
    """A dataclass with the ``init`` fields of ``target``, for Hydra to check overrides against.

    Args:
        target: a dataclass: a method or a bench.
        name: its name in the registry; becomes the field ``name``.

    Types that OmegaConf cannot express (tensors, literals, "scalar or list") become Any: the
    dataclass's own checks see them.
    """
    hints = get_type_hints(target)
    columns: list[tuple[str, Any, Field[Any]]] = [("name", str, field(default=name))]
    for entry in fields(target):
        if not entry.init:
            continue
        hint = hints[entry.name] if _is_plain(hints[entry.name]) else Any
        if entry.default_factory is not NO_DEFAULT:
            column = field(default_factory=entry.default_factory)
        else:
            column = field(default=MISSING if entry.default is NO_DEFAULT else entry.default)
        columns.append((entry.name, hint, column))
    return make_dataclass(target.__name__, columns)


def _is_plain(hint: Any) -> bool:
    """Whether OmegaConf knows the type: a scalar, or an optional, a list or a dict of scalars."""
    scalars = (bool, int, float, str)
    if get_origin(hint) in (Union, types.UnionType):
        inner = [part for part in get_args(hint) if part is not type(None)]
        return len(inner) == 1 and _is_plain(inner[0])
    if get_origin(hint) is list:
        return get_args(hint)[0] in scalars
    if get_origin(hint) is dict:  # parameters of a part, checked by the part
        return get_args(hint)[0] is str
    return hint in scalars


def checkpoint_digest(path: str) -> str | None:
    """Digest of a local checkpoint: its config, and names, sizes and ends of its weight files.

    None for a name on the hub. A whole hash of the weights would take minutes for a large model.
    """
    folders = (Path(path).expanduser(), ROOT / path)
    folder = next((found for found in folders if (found / "config.json").is_file()), None)
    if folder is None:
        return None
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as weights:
            digest.update(weights.read(1 << 20))
            weights.seek(max(0, size - (1 << 20)))
            digest.update(weights.read())
    return digest.hexdigest()[:12]


def _digest(tree: Mapping[str, Any]) -> str:
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]

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
from dataclasses import Field, asdict, dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any, Optional, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
MODES = ("offline", "online", "disabled")  # of W&B
MATCHED = ("density", "coverage")
RUNNERS = ("process", "local", "slurm")
WEIGHTS = ("pretrained", "random")
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
        tp: shard the model over the processes of ``torchrun`` (tensor parallelism).
        weights: "pretrained", or "random": the architecture with weights drawn anew, for times.
        architecture: folder with a config.json to draw random weights for; default: ``path``.
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
    tp: bool = False
    weights: str = "pretrained"
    architecture: str | None = None
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ConfigError(f"model.weights={self.weights}: expected {' or '.join(WEIGHTS)}")

    @property
    def source(self) -> str:
        """Where the architecture, and the weights if they are not drawn, come from."""
        is_drawn = self.weights == "random"
        return self.architecture if is_drawn and self.architecture else self.path


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
class MatchConfig:
    """Sets the method's knob so that it meets a target on prompts that are not measured.

    Attributes:
        quantity: "density" or "coverage".
        target: what to meet, in (0, 1). One number; several make a sweep of cells.
        tolerance: how near is near enough.
        lengths: of the held-out prompts; default: the bench's.
        num_prompts: held-out prompts of each length.
        max_steps: values of the knob to try at most.
    """

    quantity: str = "density"
    target: Any = MISSING
    tolerance: float = 0.005
    lengths: Any = None
    num_prompts: int = 5
    max_steps: int = 16

    def __post_init__(self) -> None:
        if self.quantity not in MATCHED:
            raise ConfigError(f"match.quantity={self.quantity}: expected {' or '.join(MATCHED)}")
        if isinstance(self.target, str):  # "???", while Hydra composes
            return
        if isinstance(self.target, bool) or not isinstance(self.target, int | float):
            raise ConfigError(
                f"match.target must be one number in (0, 1), got {self.target}; each target is a "
                "cell of its own: -m match.target=0.2,0.3"
            )
        if not 0 < self.target < 1:
            raise ConfigError(f"match.target must lie in (0, 1), got {self.target}")
        if not 0 < self.tolerance < 1 or self.num_prompts < 1 or self.max_steps < 2:
            raise ConfigError(
                "match.tolerance must lie in (0, 1), match.num_prompts be at least 1 and "
                f"match.max_steps at least 2, got {self.tolerance}, {self.num_prompts} and "
                f"{self.max_steps}"
            )


@dataclass
class RunnerConfig:
    """Where the parts of a bench run. Changes no result and is no part of a run's identity.

    Attributes:
        name: "process" (this one), or OpenCompass's "local" or "slurm": a process per part.
        workers: parts at a time.
        gpus: GPUs a part gets; default: one if there are any here.
        partition: of Slurm.
        options: further words of srun, such as "-c 12".
        dry_run: only show what would be started.
    """

    name: str = "process"
    workers: int = 8
    gpus: int | None = None
    partition: str | None = None
    options: list[str] = field(default_factory=list)
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.name not in RUNNERS:
            raise ConfigError(f"runner.name={self.name}: expected one of {', '.join(RUNNERS)}")
        if self.workers < 1:
            raise ConfigError(f"runner.workers must be at least 1, got {self.workers}")


@dataclass
class RunConfig:
    """One cell: a model, a method, a bench.

    Attributes:
        model: see :class:`ModelConfig`.
        method: "name" and the method's parameters.
        bench: "name" and the bench's parameters.
        logger: see :class:`LoggerConfig`.
        paths: see :class:`PathsConfig`.
        runner: see :class:`RunnerConfig`.
        match: see :class:`MatchConfig`; None runs the method as it is.
        seed: seed of everything random.
        check: run the safety gate before measuring.
        resume: continue an interrupted run and skip a finished one; false starts again.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    method: Any = MISSING
    bench: Any = MISSING
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    runner: RunnerConfig = field(default_factory=RunnerConfig)
    match: Optional[MatchConfig] = None  # noqa: UP045 - OmegaConf reads no other spelling
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
        run.model.checkpoint = checkpoint_digest(run.model.source)
        return run

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> RunConfig:
        """Rebuild from plain data, as in a run's ``config.yaml``."""
        typed = {"model": ModelConfig, "logger": LoggerConfig, "paths": PathsConfig}
        groups: dict[str, Any] = {key: group(**tree[key]) for key, group in typed.items()}
        groups["runner"] = RunnerConfig(**tree.get("runner") or {})
        if tree.get("match") is not None:
            groups["match"] = MatchConfig(**tree["match"])
        return cls(**{**tree, **groups})

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @property
    def model_name(self) -> str:
        """Name of the model in folders and tables."""
        name = self.model.name or Path(self.model.source).name
        if self.model.weights == "random":
            name = f"{name}_random"
        return re.sub(r"[^\w.-]+", "_", name)

    @property
    def hash(self) -> str:
        """Identity of the run: of everything that can change its result, and of nothing else."""
        return digest(self._identity())

    @property
    def sample_set(self) -> str:
        """Identity of what is asked, whatever the method: runs that share it can be paired."""
        return digest({**replace(self, match=None)._identity(), "method": None})

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
        if not model["tp"]:  # runs from before there was such a thing keep their identity
            del model["tp"]
        if model["weights"] == "pretrained":  # likewise
            del model["weights"], model["architecture"]
        identity = {"model": model, "method": self.method, "bench": self.bench, "seed": self.seed}
        # Runs without a match keep the identity they had before there was such a thing.
        return identity if self.match is None else {**identity, "match": asdict(self.match)}


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


def digest(tree: Mapping[str, Any]) -> str:
    """Short name of plain data, the same in every process."""
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]

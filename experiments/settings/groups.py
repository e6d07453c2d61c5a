"""The groups of settings that are not a method or a bench, with the checks of their values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from omegaconf import MISSING

from experiments.errors import ConfigError
from experiments.settings.checks import check_lists, shorten

MODES = ("offline", "online", "disabled")  # of W&B
MATCHED = ("density", "coverage")
RUNNERS = ("process", "local", "slurm")
WEIGHTS = ("pretrained", "random")
DEVICE = r"auto|cpu|cuda(:\d+)?"
LONGEST_NAME = 100  # of a folder


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
        config: entries of the checkpoint's own config to change.
        rope_factor: so many times the positions that the checkpoint was trained on, by YaRN (arXiv
            2309.00071), untrained; the model's name in results says so ("_yarn4"). Null: as it is.
        tp: shard the model over the processes of ``torchrun`` (tensor parallelism).
        processes: how many those are, filled in: times depend on it.
        weights: "pretrained", or "random": the architecture with weights drawn anew, for times.
        architecture: folder with a config.json to draw random weights for; default: ``path``.
        checkpoint: digests of a local checkpoint's files by their names, filled in: another one
            under the same path is another run, the same one under another path is not. In older
            runs one digest of their beginnings and ends, a text.
    """

    name: str | None = None
    path: str = MISSING
    dtype: str = "auto"
    device: str = "auto"
    device_map: Any = None
    max_length: int | None = None
    trust_remote_code: bool = False
    config: Any = None
    rope_factor: float | None = None
    tp: bool = False
    processes: int | None = None
    weights: str = "pretrained"
    architecture: str | None = None
    checkpoint: Any = None

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ConfigError(f"model.weights={self.weights}: expected {' or '.join(WEIGHTS)}")
        if not self.path:
            raise ConfigError("model.path must be a folder or a name on the hub, got nothing")
        if self.name is not None and not is_folder_name(self.name):
            raise ConfigError(
                f"model.name={shorten(self.name)} becomes a folder's name: expected 1 to "
                f"{LONGEST_NAME} characters that are not all dots"
            )
        if not re.fullmatch(DEVICE, self.device):
            raise ConfigError(f"model.device={self.device}: expected auto, cpu, cuda or cuda:N")
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(
                "model.max_length must be at least 2 tokens, or null for what the model's config "
                f"says, got {self.max_length}"
            )
        if self.rope_factor is not None and not 1 < self.rope_factor <= 64:
            raise ConfigError(
                f"model.rope_factor must lie in (1, 64], or be null, got {self.rope_factor}"
            )
        if self.config is not None and not isinstance(self.config, Mapping):
            raise ConfigError(
                "model.config must be entries of the checkpoint's config such as "
                f"{{rope_theta: 1e6}}, got {shorten(self.config)}"
            )
        if not isinstance(self.device_map, str | Mapping | None):
            raise ConfigError(
                "model.device_map must be a name such as auto, or a mapping of modules to devices, "
                f"got {shorten(self.device_map)}"
            )

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
        if self.name != "wandb":
            raise ConfigError(
                f"logger.name={self.name}: expected wandb; logger.mode=disabled is off"
            )
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

    def __post_init__(self) -> None:
        for key, path in asdict(self).items():
            if not path:
                raise ConfigError(f"paths.{key} must name a folder, got nothing; try outputs")


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
        if self.target == MISSING:  # while Hydra composes
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
        if self.lengths is not None and not _are_lengths(self.lengths):
            raise ConfigError(
                "match.lengths must be a list of positive integers such as [1024,4096], or null "
                f"for the bench's, got {shorten(self.lengths)}"
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
        if self.gpus is not None and self.gpus < 0:
            raise ConfigError(f"runner.gpus must be at least 0, or null, got {self.gpus}")
        try:
            check_lists(RunnerConfig, {"options": self.options}, "runner")
        except ValueError as error:
            raise ConfigError(str(error)) from error


def is_folder_name(name: str) -> bool:
    """Whether a text can name a folder: not empty, not too long, no "." or ".."."""
    return 0 < len(name) <= LONGEST_NAME and name.strip(".") != ""


def _are_lengths(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(type(length) is int and length > 0 for length in value)
    )

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

from experiments.content import ROOT, checkpoint_files, digests_of
from experiments.settings.checks import check_keys, check_numbers
from experiments.settings.credentials import refuse_in_settings
from experiments.settings.groups import (
    ConfigError,
    LoggerConfig,
    MatchConfig,
    ModelConfig,
    PathsConfig,
    RunnerConfig,
    is_folder_name,
)
from experiments.settings.ranks import num_ranks

__all__ = [
    "CONF",
    "DENSE",
    "FIGURES",
    "ROOT",
    "ConfigError",
    "LoggerConfig",
    "MatchConfig",
    "ModelConfig",
    "PathsConfig",
    "RunConfig",
    "RunnerConfig",
    "digest",
    "make_schema",
    "parameters",
]

CONF = ROOT / "conf"
# Of the paper, see experiments/report/pictures/paper.py.
FIGURES = ("figure1", "figure5", "figure13", "table6")
DENSE = "flash"  # the method that every other is compared with
LARGEST_SEED = 2**32 - 1  # the most that every generator of numbers takes


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
        figure: one of ``FIGURES``, drawn over all cells of the command; changes no result.
        seed: seed of everything random.
        inputs: digests of the files that the bench and the method read, by the setting that names
            them, filled in; None without such files. Other content is another run.
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
    figure: str | None = None
    seed: int = 0
    inputs: Any = None
    check: bool = True
    resume: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ConfigError(f"seed must lie in [0, {LARGEST_SEED}], got {self.seed}")

    @classmethod
    def from_hydra(cls, cfg: DictConfig) -> RunConfig:
        """Resolve what Hydra composed.

        Raises:
            ConfigError: a mandatory setting has no value, or a value that nothing can be run with.
        """
        try:
            tree = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        except MissingMandatoryValue as error:
            key = error.full_key
            raise ConfigError(f"{key} needs a value: add {key}=... to the command") from error
        for group in ("method", "bench"):  # "~bench" takes a group away
            if not isinstance(tree.get(group), Mapping) or "name" not in tree[group]:
                raise ConfigError(f"{group} needs a value: add {group}=... to the command")
        try:
            check_numbers(tree)
            refuse_in_settings(tree)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        run = cls.from_dict(tree)
        _check_names(run)
        if run.figure is not None and run.figure not in FIGURES:
            raise ConfigError(f"figure={run.figure}: expected one of {', '.join(FIGURES)}")
        source = Path(run.model.source)
        if run.model.name is None and not is_folder_name(source.name):
            # model.path=. or .. is a checkpoint without a name: elsewhere it would get another one.
            run.model.name = source.resolve().name or "model"
        run.inputs = digests_of(_input_files(run)) or None
        run.model.checkpoint = None
        if run.uses_model:
            has_weights = run.model.weights == "pretrained"
            run.model.checkpoint = checkpoint_files(run.model.source, has_weights=has_weights)
        run.model.processes = num_ranks() if run.model.tp else None
        return run

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> RunConfig:
        """Rebuild from plain data, as in a run's ``config.yaml``.

        Raises:
            ConfigError: an unknown key, or a value outside its range.
        """
        typed = {
            "model": ModelConfig,
            "logger": LoggerConfig,
            "paths": PathsConfig,
            "runner": RunnerConfig,
        }
        if tree.get("match") is not None:
            typed["match"] = MatchConfig
        try:
            check_keys(cls, tree, "key or group:")
            for key, group in typed.items():
                check_keys(group, tree.get(key) or {}, f"key of {key!r}:")
        except ValueError as error:
            raise ConfigError(str(error)) from error
        groups = {key: group(**tree.get(key) or {}) for key, group in typed.items()}
        return cls(**{**tree, **groups})

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @property
    def uses_model(self) -> bool:
        """Whether the bench runs the model; attention on generated inputs does not."""
        from experiments.settings.bench_names import BENCHES

        return BENCHES.load(self.bench["name"]).uses_model(self.bench)

    @property
    def model_name(self) -> str:
        """Name of the model in folders and tables; of drawn inputs where no model runs."""
        if not self.uses_model:
            return "generated_inputs"
        source = Path(self.model.source)
        name = self.model.name or source.name
        if not is_folder_name(name):  # model.path=. or .. is a checkpoint without a name
            name = source.resolve().name or "model"
        if self.model.weights == "random":
            name = f"{name}_random"
        if self.model.rope_factor is not None:
            name = f"{name}_yarn{self.model.rope_factor:g}"
        return re.sub(r"[^\w.-]+", "_", name)

    @property
    def hash(self) -> str:
        """Identity of the run: of everything that can change its result, and of nothing else."""
        return digest(self._identity())

    @property
    def sample_set(self) -> str:
        """Identity of what is asked, whatever the method: the settings of bench and model, and the
        content of the files they name."""
        asked = replace(self, match=None, inputs=self._inputs_of("bench") or None)
        return digest({**asked._identity(), "method": None})

    @property
    def group(self) -> Path:
        """Folder of all runs of this bench and model."""
        return Path(self.paths.outputs) / self.bench["name"] / self.model_name

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.group / self.method["name"] / self.hash

    @property
    def contents(self) -> dict[str, str]:
        """Digests of all files that the run reads, by setting and file name.

        Empty for runs from before files were digested one by one.
        """
        checkpoint = self.model.checkpoint if self.uses_model else None
        files = checkpoint if isinstance(checkpoint, Mapping) else {}
        return {**{f"model/{name}": text for name, text in files.items()}, **(self.inputs or {})}

    @property
    def identity_without_content(self) -> dict[str, Any]:
        """What the user asked for, whatever the files it names hold."""
        identity = self._identity()
        where = ("path", "architecture", "checkpoint")
        model = {key: value for key, value in (identity["model"] or {}).items() if key not in where}
        return {**identity, "model": model, "inputs": None}

    def _identity(self) -> dict[str, Any]:
        identity = {
            "model": self.model_identity,
            "method": self.identity_without_paths("method"),
            "bench": self.identity_without_paths("bench"),
            "seed": self.seed,
        }
        # Runs without files or a match keep the identity they had before there was such a thing.
        if self.inputs:
            identity["inputs"] = dict(self.inputs)
        return identity if self.match is None else {**identity, "match": asdict(self.match)}

    def _inputs_of(self, group: str) -> dict[str, str]:
        inputs = self.inputs or {}
        return {name: text for name, text in inputs.items() if name.startswith(f"{group}.")}

    def identity_without_paths(self, group: str) -> dict[str, Any]:
        """A group's settings; of files whose content is known only the name, of folders nothing."""
        settings = dict(getattr(self, group))
        for name in self._inputs_of(group):
            setting, _, inside = name.partition("/")
            key = setting.partition(".")[2]
            settings[key] = None if inside or not settings[key] else Path(settings[key]).name
        return settings

    @property
    def model_identity(self) -> dict[str, Any] | None:
        """What tells models apart: of a local checkpoint its content, wherever it lies."""
        if not self.uses_model:
            return None
        model = {key: value for key, value in asdict(self.model).items() if key != "name"}
        if isinstance(model["checkpoint"], Mapping):  # in older runs a text: their path counts
            del model["path"], model["architecture"]
        if model["checkpoint"] is None:  # on the hub, where the name says which
            del model["checkpoint"]
        if not model["tp"]:  # runs from before there was such a thing keep their identity
            del model["tp"], model["processes"]
        if model["rope_factor"] is None:  # likewise
            del model["rope_factor"]
        if model["weights"] == "pretrained":  # likewise
            del model["weights"]
            model.pop("architecture", None)
        return model


def _check_names(run: RunConfig) -> None:
    """Names of methods and benches become folders: only registered ones do."""
    from experiments.settings.bench_names import BENCHES
    from pbs.methods import METHODS
    from pbs.registry import unknown

    for registry, settings in ((METHODS, run.method), (BENCHES, run.bench)):
        if settings["name"] not in registry.names:
            raise ConfigError(unknown(registry.kind, str(settings["name"])[:80], registry.names))


def _input_files(run: RunConfig) -> dict[str, Path]:
    """The files that the bench and the method read, by the setting that names them."""
    from experiments.settings.bench_names import BENCHES

    files = BENCHES.load(run.bench["name"]).input_files(parameters(run.bench))
    named = {f"bench.{name}": path for name, path in files.items()}
    for key, value in parameters(run.method).items():
        if key.endswith("_path") and value is not None and Path(value).is_file():
            named[f"method.{key}"] = Path(value)
    return named


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


def digest(tree: Mapping[str, Any]) -> str:
    """Short name of plain data, the same in every process."""
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]

"""``bench=opencompass``: any data set that the installed OpenCompass ships, by its own name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from experiments.benches.base import Bench, Context
from experiments.benches.opencompass.base import OpenCompassBench
from experiments.benches.opencompass.files import MissingDataError
from experiments.benches.opencompass.parts import Part
from experiments.settings.config import ConfigError
from pbs.registry import unknown

if TYPE_CHECKING:
    from experiments.benches.opencompass.harness import EvaluatedTask
    from experiments.settings.config import RunConfig

CACHE = "COMPASS_DATA_CACHE"
# What a data set of generated answers has.
KEYS = {"abbr", "type", "reader_cfg", "infer_cfg", "eval_cfg"}


@dataclass(kw_only=True)
class OpenCompassDatasets(OpenCompassBench):
    """Scores of data sets of OpenCompass, by their own metrics; the overall score is their mean.

    Args:
        datasets: names of OpenCompass's config files (``babilong_4k_gen``), all of whose data sets
            run, or of one data set in such a file (``babilong_4k_gen/babilong_qa1_4k``).
        data_dir: where OpenCompass looks for data files first (its ``COMPASS_DATA_CACHE``); then
            in ~/.cache/opencompass; most it fetches from a network.
        max_out_len: tokens of an answer; default: what each config says.
    """

    states_out_len: ClassVar[bool] = True
    which_samples: ClassVar[tuple[str, ...]] = ("limit", "datasets", "fraction")

    tasks: list[str] = field(init=False, default_factory=list)
    datasets: list[str] = field(default_factory=list)
    _configs: dict[str, tuple[str, Any]] = field(init=False, default_factory=dict, repr=False)
    _sizes: dict[str, int] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.datasets or len(set(self.datasets)) < len(self.datasets):
            raise ValueError(
                "bench.datasets must name data sets of OpenCompass, each once, such as "
                f"[babilong_4k_gen], got {self.datasets}"
            )
        self.tasks = list(self.datasets)
        Bench.__post_init__(self)
        self.check_sizes()

    @property
    def is_partial(self) -> bool:
        """Whether samples are left out."""
        return self.limit is not None or (self.fraction is not None and self.fraction < 1)

    @classmethod
    @override
    def input_files(cls, settings: Mapping[str, Any]) -> dict[str, Path]:
        """See the base class: which files its loaders read, OpenCompass alone knows."""
        return {}

    @classmethod
    @override
    def data_files(cls, folder: Path, tasks: Sequence[str]) -> list[str]:
        """See the base class."""
        return []

    @override
    def prepare_data(self, cfg: RunConfig) -> None:
        """See the base class: reads the configs; data are read when their part runs."""
        self.configs()

    def configs(self) -> dict[str, tuple[str, Any]]:
        """File and config of every data set, by its abbreviation.

        Raises:
            ConfigError: a name that OpenCompass does not have.
        """
        if not self._configs:
            for name in self.datasets:
                file, _, single = name.partition("/")
                found = {one["abbr"]: one for one in read_configs(file)}
                if single and single not in found:
                    raise ConfigError(unknown(f"data set of {file}:", single, found))
                for abbr, config in found.items():
                    if not single or abbr == single:
                        self._configs[abbr] = (file, config)
        return self._configs

    def parts(self) -> list[Part]:
        """See the base class."""
        return [
            Part(abbr, {"task": abbr, "config": file}) for abbr, (file, _) in self.configs().items()
        ]

    def run(self, context: Context) -> None:
        """See the base class; OpenCompass's loaders look into ``data_dir``."""
        with _data_in(self.data_dir):
            super().run(context)

    def num_rows(self, part: Part) -> int:
        """See the base class.

        Raises:
            MissingDataError: OpenCompass could not load the data.
        """
        if part.key not in self._sizes:
            from opencompass.utils import build_dataset_from_cfg

            with _explained(part.key, self.configs()[part.key][1]):
                built = build_dataset_from_cfg(_copy(self.configs()[part.key][1]))
                self._sizes[part.key] = len(built.test)
        return self._sizes[part.key]

    @override
    def dataset(self, part: Part, cfg: RunConfig) -> Any:
        """See the base class."""
        return _copy(self.configs()[part.key][1])

    @override
    def make_task(self, part: Part, cfg: RunConfig, work_dir: Path) -> EvaluatedTask:
        """See the base class."""
        with _explained(part.key, self.configs()[part.key][1]):
            return super().make_task(part, cfg, work_dir)


@lru_cache(maxsize=1)
def config_files() -> dict[str, Path]:
    """OpenCompass's config files of data sets, by their names. Does not import it."""
    found = find_spec("opencompass")
    places = found.submodule_search_locations if found else None
    if not places:
        return {}
    root = Path(next(iter(places))) / "configs" / "datasets"
    return {path.stem: path for path in sorted(root.rglob("*.py")) if path.stem != "__init__"}


def read_configs(name: str) -> list[Any]:
    """The data sets of a config file whose answers are generated.

    Raises:
        ConfigError: no such file, or its data sets are not of that kind.
    """
    files = config_files()
    if name not in files:
        raise ConfigError(unknown("data set config of OpenCompass:", name, files))
    from mmengine.config import Config
    from opencompass.openicl.icl_inferencer import GenInferencer

    try:
        content = Config.fromfile(str(files[name]))
    except Exception as error:  # whatever a config of somebody else's raises
        raise ConfigError(
            f"OpenCompass's {name} cannot be read ({type(error).__name__}: {error}); some of its "
            "configs need further packages"
        ) from error
    found = [
        one
        for value in content.values()
        if isinstance(value, list)
        for one in value
        if isinstance(one, Mapping) and one.keys() >= KEYS
    ]
    kinds = {one["infer_cfg"]["inferencer"]["type"] for one in found}
    names = {kind if isinstance(kind, str) else kind.__name__ for kind in kinds}
    if not found or any(GenInferencer.__name__ not in kind for kind in names):
        what = f"infers by {', '.join(sorted(names))}" if found else "defines no data set"
        raise ConfigError(
            f"OpenCompass's {name} {what}; bench=opencompass takes data sets whose answers are "
            "generated, mostly called ..._gen"
        )
    return list({one["abbr"]: one for one in found}.values())


def _copy(config: Any) -> Any:
    import copy

    return copy.deepcopy(config)


@contextmanager
def _data_in(folder: str | None) -> Iterator[None]:
    """Inside, OpenCompass's loaders look into this folder first."""
    before = os.environ.get(CACHE)
    if folder is not None:
        os.environ[CACHE] = str(Path(folder).expanduser().resolve())
    try:
        yield
    finally:
        if folder is not None:
            os.environ.pop(CACHE)
            if before is not None:
                os.environ[CACHE] = before


@contextmanager
def _explained(abbr: str, config: Mapping[str, Any]) -> Iterator[None]:
    """Say which data are missing, and where OpenCompass looks for them."""
    try:
        yield
    except Exception as error:  # loaders and downloads raise whatever they like
        from opencompass.utils.datasets_info import DATASETS_MAPPING

        path = config.get("path", "its path")
        local = Path(DATASETS_MAPPING.get(path, {}).get("local") or path)
        raise MissingDataError(
            f"OpenCompass could not load the data of {abbr} ({type(error).__name__}: {error}). It "
            f"looks for {local} in bench.data_dir, then in "
            "~/.cache/opencompass, then on the network; where they come from says its README "
            "(https://github.com/open-compass/opencompass, data preparation)"
        ) from error

"""What a bench is. A new one is a file with such a class and a file in conf/bench/."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from experiments.metrics import Metric, summarise_metrics
from experiments.notes import coverage_facts
from experiments.run_environments import prefill_times
from experiments.settings.config import ConfigError, RunConfig
from experiments.store import Record

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.gate.coverage import CoverageProbe
    from experiments.models.load import LoadedModel
    from pbs.methods import AttentionMethod


@dataclass(frozen=True)
class Context:
    """What a bench works with.

    Attributes:
        cfg: the whole configuration.
        method: the method under test.
        model: the loaded model, not patched; None if the bench needs none.
        folder: the run's folder, for pictures and other files.
        done: ids of the samples an earlier process measured: not to be measured again.
        announce: tells how many samples there are in all, before the first is measured.
        add: takes one record, which has a ``sample_id``; it is on disk when this returns.
        records: all there are so far, those of earlier processes among them.
    """

    cfg: RunConfig
    method: AttentionMethod
    model: LoadedModel | None
    folder: Path
    done: frozenset[str]
    announce: Callable[[int], None]
    add: Callable[[Record], None]
    records: Callable[[], Sequence[Record]] = list


@dataclass(kw_only=True)
class Bench(ABC):
    """Measures a method. A dataclass: its fields are its parameters, with their defaults.

    Args:
        limit: samples per task at most; marks the result as partial.
    """

    needs_model: ClassVar[bool] = True
    # Parameters that say which samples are measured, or what is measured beside the answer, and
    # change no sample: runs that differ in these alone have samples in common.
    which_samples: ClassVar[tuple[str, ...]] = ("limit",)
    # What is measured of each sample, the one that ranks runs first.
    metrics: ClassVar[tuple[Metric, ...]] = ()
    # Keys of the records that divide them into cells, the rows of results.
    cells_by: ClassVar[tuple[str, ...]] = ()
    # Whether every cell times dense attention beside the method: no dense run is needed then.
    times_dense: ClassVar[bool] = False

    limit: int | None = None
    # Parts that failed in this run while others went on: the run has failed, with results.
    failures: dict[str, dict[str, Any]] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Check the parameters; subclasses call ``super().__post_init__()`` first."""
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"bench.limit must be at least 1, or null for all, got {self.limit}")

    @property
    def is_partial(self) -> bool:
        """Whether the result stands for less than the whole bench."""
        return self.limit is not None

    @classmethod
    def uses_model(cls, settings: Mapping[str, Any]) -> bool:
        """Whether results depend on the run's model, which their folder is then named after.

        Args:
            settings: the bench's name and parameters.
        """
        return cls.needs_model

    @classmethod
    def input_files(cls, settings: Mapping[str, Any]) -> dict[str, Path]:
        """The local files the bench reads, whose content is part of a run's identity.

        Args:
            settings: the bench's parameters.

        Returns:
            Path by the parameter that names the file, such as "text"; for a file in a folder by the
            parameter and its name, "data_dir/data.json". Only files that are there: what is missing
            :meth:`prepare` says. Files of the hub are not among them: its name says which they are,
            and each sample's ``input_digest`` what they held.
        """
        return {}

    def prepare(self, cfg: RunConfig) -> None:
        """Check what can be checked before a model is loaded; may raise ConfigError."""

    @abstractmethod
    def run(self, context: Context) -> None:
        """Measure every sample that is not done and hand over its record."""

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """Results of the records; pure, so that a resumed run equals an undisturbed one.

        Default: means of the declared ``metrics``, of density, coverage and time to first token
        where records have them, over all samples and over each cell (``cells_by``).

        Returns:
            ``{"total": {...}, "cells": [{...}, ...], ...}``; ``cells`` become the rows of
            :func:`experiments.results.load`. Beside the metrics, tables and pictures know
            ``num_samples``, ``density``, ``coverage`` and ``prefill_seconds``.
        """
        cells: dict[tuple[Any, ...], list[Record]] = {}
        for record in records:
            cells.setdefault(tuple(record[key] for key in self.cells_by), []).append(record)
        return {
            "total": self._measure(records),
            "cells": [
                {**dict(zip(self.cells_by, names, strict=True)), **self._measure(part)}
                for names, part in cells.items()
            ],
        }

    def _measure(self, records: Sequence[Record]) -> dict[str, Any]:
        found = {"num_samples": len(records), **summarise_metrics(self.metrics, records)}
        for name in ("density", "coverage"):
            values = [record[name] for record in records if record.get(name) is not None]
            found[name] = sum(values) / len(values) if values else None
        if any("coverage" in record for record in records):
            found |= coverage_facts(records)
        if records and all("prefill_seconds" in record for record in records):
            found |= prefill_times(records)
        return found

    def paired_scores(
        self,
        ours: Sequence[Record],
        dense: Sequence[Record],
    ) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
        """Scores (0 to 1) by sample id of two runs on the same samples, to be compared in pairs.

        The third are the weights of the samples in the overall score. Only benches whose answers
        are not simply right or wrong have scores.
        """
        return {}, {}, {}

    def held_out(
        self,
        model: LoadedModel,
        *,
        lengths: Sequence[int] | None,
        num_prompts: int,
        seed: int,
    ) -> list[tuple[str, Tensor]]:
        """Prompts like those of the bench that it never measures, to set a method's knob on.

        Args:
            model: the loaded model.
            lengths: in tokens; default: the bench's.
            num_prompts: of each length.
            seed: of the bench's own prompts.

        Returns:
            Names and token ids ``[1, N]`` on the model's device.

        Raises:
            ConfigError: the bench has none.
        """
        raise ConfigError(
            f"{type(self).__name__} has no held-out prompts; match needs bench=needle"
        )

    def coverage_probe(self, model: LoadedModel) -> CoverageProbe:
        """What measures coverage the way the bench does; default: everything."""
        from experiments.gate.coverage import CoverageProbe

        return CoverageProbe()

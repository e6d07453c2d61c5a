"""What benches that take times share: lengths and densities, what is timed, how often."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from experiments.benches.base import Bench, Context
from experiments.settings.config import ConfigError, RunConfig, parameters
from experiments.settings.names import describe
from experiments.store import Record
from experiments.timing.published import density_at
from experiments.timing.timing_report import summarise_times

if TYPE_CHECKING:
    from pbs.methods import AttentionMethod

# Instead of a list of densities: those of the paper's Table 5.
PUBLISHED = "published"
# Tokens of a cell; a call of one layer of an 8B model's heads takes a processor about a minute.
LONGEST_ON_A_CPU = 65536


@dataclass(kw_only=True)
class TimedBench(Bench):
    """Times methods beside dense attention, all of a cell's variants in turns.

    Args:
        lengths: in tokens.
        densities: null: what a method selects itself. A list, or "published" (those of the paper's
            Table 5): a method pays for its order and selection and then computes random tiles at
            exactly this density.
        beside: further methods to time in the same cells, settings as of ``method`` by label:
            ``{pbs shared: {name: pbs, gqa: shared}}``. Their rows in results bear their own names.
        dense: dense kernels to compare with; default all there are.
        seconds: of timed calls of a cell, all variants together.
        min_rounds: calls of each variant at least.
        max_rounds: calls of each variant at most.
    """

    times_dense: ClassVar[bool] = True
    # What to add to a command so that a processor finishes it in minutes.
    small_form: ClassVar[str] = "bench.lengths=[8192]"

    lengths: list[int] = field(default_factory=lambda: [4096, 8192, 16384])
    densities: Any = None
    beside: dict[str, Any] = field(default_factory=dict)
    dense: list[str] | None = None
    seconds: float = 10.0
    min_rounds: int = 5
    max_rounds: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lengths or min(self.lengths) < 2:
            raise ValueError(f"bench.lengths must be at least 2, got {self.lengths}")
        densities = self.densities
        if densities == PUBLISHED or densities is None:
            return
        if not isinstance(densities, list | tuple) or any(
            not isinstance(one, int | float) or isinstance(one, bool) or not 0 < one <= 1
            for one in densities
        ):
            raise ValueError(
                f"bench.densities must be null, {PUBLISHED} or a list of numbers in (0, 1], "
                f"got {densities}"
            )

    def prepare(self, cfg: RunConfig) -> None:
        """See the base class."""
        for label, settings in self.beside.items():
            if not isinstance(settings, Mapping) or "name" not in settings:
                raise ConfigError(
                    f"bench.beside must hold a method's settings by label, such as "
                    f"{{pbs shared: {{name: pbs, gqa: shared}}}}, got {settings} for {label!r}"
                )
            if label == describe(cfg.method):
                raise ConfigError(f"bench.beside: {label!r} is the run's own method")
        self._beside()
        self._refuse_hours(cfg)

    def _refuse_hours(self, cfg: RunConfig) -> None:
        """A GPU's lengths on a processor, unless it was asked for by name."""
        import torch

        longest, is_own = max(self.lengths), hasattr(self, "device")
        device = getattr(self, "device", cfg.model.device)
        if longest <= LONGEST_ON_A_CPU or device != "auto" or torch.cuda.is_available():
            return
        raise ConfigError(
            f"bench.lengths goes to {longest} tokens, which is for a GPU, and none is here: this "
            f"processor would need hours. The small form: add {self.small_form}; or insist with "
            f"{'bench' if is_own else 'model'}.device=cpu"
        )

    def methods(self, context: Context) -> dict[str, AttentionMethod]:
        """The run's method and those beside it, by label."""
        return {describe(context.cfg.method): context.method, **self._beside()}

    def _beside(self) -> dict[str, AttentionMethod]:
        from pbs.methods import build_method

        return {
            label: build_method(settings["name"], **parameters(settings))
            for label, settings in self.beside.items()
        }

    def density_of(self, index: int) -> float | None:
        """Of the length of this number, where each has one of its own."""
        if self.densities == PUBLISHED:
            return density_at(self.lengths[index])[0]
        return None if self.densities is None else float(self.densities[index])

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """See the base class; with the break-even length over every dense kernel."""
        return summarise_times(records, beside=self.beside)

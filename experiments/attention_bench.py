"""``bench=attention``: time of one attention call beside every dense kernel, checked first."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from experiments.bench import Bench, Context
from experiments.store import Record
from experiments.timing_report import draw_speed_up, lines_of, summarise_times, write_times
from pbs.registry import unknown

if TYPE_CHECKING:
    from experiments.attention_timing import Cell, Inputs

logger = logging.getLogger(__name__)

# "model" takes q, k and v of a layer of the run's model on generated tokens.
STRUCTURES = ("random", "vertical", "slash", "mixed", "model")


@dataclass(kw_only=True)
class AttentionBench(Bench):
    """Op level: order, selection, gather, attention and total over lengths, shapes and densities.

    No time is given for an output that has not just matched exact attention on sampled rows. What
    fails (out of memory, a kernel that is not there) is a recorded result.

    Args:
        lengths: queries and keys.
        shapes: heads as Hq/Hkv/D.
        structure: of the inputs: "random", "vertical", "slash", "mixed" or "model".
        densities: null: what the method selects itself; a list: the method pays for its order and
            selection and then computes random tiles at each of these exact densities.
        densities_by_length: the list has one density per length instead.
        dense: dense kernels to compare with; default all there are.
        dtype: "auto" is bfloat16 on a GPU and float32 on a CPU.
        device: "auto" is a GPU if there is one.
        seconds: of timed calls of a cell, all variants together.
        min_rounds: calls of each variant at least.
        max_rounds: calls of each variant at most.
        coverage_rows: queries to measure coverage on; 0 leaves it out.
        layer: for structure "model".
    """

    needs_model: ClassVar[bool] = False

    lengths: list[int] = field(default_factory=lambda: [4096, 8192, 16384])
    shapes: list[str] = field(default_factory=lambda: ["32/8/128"])
    structure: str = "mixed"
    densities: list[float] | None = None
    densities_by_length: bool = False
    dense: list[str] | None = None
    dtype: str = "auto"
    device: str = "auto"
    seconds: float = 10.0
    min_rounds: int = 5
    max_rounds: int = 50
    coverage_rows: int = 64
    layer: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.structure not in STRUCTURES:
            raise ValueError(unknown("structure of bench attention:", self.structure, STRUCTURES))
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"bench.lengths must be positive numbers, got {self.lengths}")
        if self.densities_by_length and len(self.densities or ()) != len(self.lengths):
            raise ValueError(
                "bench.densities_by_length needs one density per length, got "
                f"{self.densities} for {self.lengths}"
            )
        if any(not 0 < density <= 1 for density in self.densities or ()):
            raise ValueError(f"bench.densities must lie in (0, 1], got {self.densities}")

    def grid(self) -> list[tuple[str, int, float | None]]:
        """Shape, length and density of every cell, short ones first."""
        cells = []
        for shape in self.shapes:
            for index, length in enumerate(self.lengths):
                densities: Sequence[float | None] = self.densities or [None]
                if self.densities_by_length:
                    densities = densities[index : index + 1]
                cells += [(shape, length, density) for density in densities]
        return cells if self.limit is None else cells[: self.limit]

    def run(self, context: Context) -> None:
        """See the base class."""
        import torch

        from experiments.attention_timing import measure_cell
        from experiments.compare import describe
        from experiments.dense_kernels import dense_kernels
        from experiments.timing import Effort, measure_rates

        device = torch.device(_device(self.device))
        dtype = _dtype(self.dtype, device.type)
        rates = measure_rates(device, dtype)
        kernels = dense_kernels(device, self.dense)
        effort = Effort(self.seconds, self.min_rounds, self.max_rounds)
        label = describe(context.cfg.method)
        grid = self.grid()
        context.announce(len(grid))
        for shape, length, density in grid:
            name = f"{shape}-N{length}-{'own' if density is None else f'{density:.4f}'}"
            if name in context.done:
                continue
            cell = self._cell(shape, length, density, dtype, device, context.cfg.seed)
            started = time.perf_counter()
            record = measure_cell(
                cell,
                {label: context.method},
                kernels,
                effort=effort,
                rates=rates,
                inputs=self._captured(context, length),
                coverage_rows=self.coverage_rows,
            )
            record["rates"] = rates.name
            record["seconds"] = time.perf_counter() - started
            context.add({"sample_id": name, **record})

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """See the base class; with the break-even length over every dense kernel."""
        return summarise_times(records)

    def draw(self, context: Context) -> list[Path]:
        """Speed-up against length; the table goes to the log and to ``times.csv``."""
        from experiments.store import RunStore

        records = RunStore(context.folder).samples()
        write_times(records, context.folder / "times.csv")
        for line in lines_of(records):
            logger.info("%s", line)
        return draw_speed_up(records, context.folder / "speed_up.png")

    def _cell(
        self, shape: str, length: int, density: float | None, dtype: Any, device: Any, seed: int
    ) -> Cell:
        from experiments.attention_timing import Cell
        from experiments.cost_model import Shape

        heads = Shape.parse(shape, element_size=dtype.itemsize)
        return Cell(heads, length, dtype, device, self.structure, density, seed)

    def _captured(self, context: Context, length: int) -> list[Inputs] | None:
        """Inputs from the run's model, for structure "model"."""
        if self.structure != "model":
            return None
        from experiments.models import load_model
        from experiments.prefill_timing import capture_inputs
        from experiments.random_weights import random_ids

        model = load_model(context.cfg.model)
        vocab = model.model.config.get_text_config().vocab_size
        ids = random_ids(vocab, length, device=model.device, seed=context.cfg.seed)
        inputs = capture_inputs(model.model, ids, layer=self.layer)
        captured = f"{inputs[0].shape[1]}/{inputs[1].shape[1]}/{inputs[0].shape[3]}"
        if self.shapes != [captured]:
            raise ValueError(
                f"structure=model has the model's own heads: add bench.shapes=[{captured}]"
            )
        dtype = _dtype(self.dtype, model.device.type)
        return [tuple(x.to(device=_device(self.device), dtype=dtype) for x in inputs)]


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _dtype(name: str, device_type: str) -> Any:
    import torch

    if name == "auto":
        return torch.bfloat16 if device_type == "cuda" else torch.float32
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"bench.dtype={name} is no floating-point dtype of torch; expected auto, float32, "
            "bfloat16 or float16"
        )
    return dtype

"""``bench=attention``: time of one attention call beside every dense kernel, checked first."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from experiments.benches.base import Context
from experiments.benches.text_files import text_files
from experiments.benches.timed import PUBLISHED, TimedBench
from experiments.content import input_digest
from experiments.timing.timing_report import failures_of
from pbs.registry import unknown

if TYPE_CHECKING:
    from experiments.timing.inputs import Cell, Inputs

logger = logging.getLogger(__name__)

DEFAULT_SHAPE = "32/8/128"
# "model" takes q, k and v of a layer of the run's model.
STRUCTURES = ("random", "vertical", "slash", "mixed", "model")


# Larger factors leave one key to each query, and overflow in half precision.
MAX_SHARPNESS = 1e4


@dataclass(kw_only=True)
class AttentionBench(TimedBench):
    """Op level: order, selection, gather, attention and total over lengths, shapes and densities.

    No time is given for an output that has not just matched exact attention on sampled rows. What
    fails (out of memory, a kernel that is not there) is a recorded result.

    Args (further ones: :class:`TimedBench`):
        shapes: heads as Hq/Hkv/D; default 32/8/128, those of Llama-3.1-8B, or the model's own for
            structure "model".
        structure: of the inputs: "random", "vertical", "slash", "mixed" or "model".
        sharpness: factor of drawn queries, at most 10,000: the larger, the fewer tiles methods
            select themselves.
        densities_by_length: the list has one density per length instead.
        dtype: "auto" is bfloat16 on a GPU and float32 on a CPU.
        device: "auto" is a GPU if there is one.
        coverage_rows: queries to measure coverage on; 0 leaves it out.
        layer: for structure "model".
        text: for structure "model": "needle" (questions of that bench, at most ``lengths`` long),
            "generated" (random tokens), or a file with text.
    """

    needs_model: ClassVar[bool] = False

    shapes: list[str] | None = None
    structure: str = "mixed"
    sharpness: float = 1.0
    densities_by_length: bool = False
    dtype: str = "auto"
    device: str = "auto"
    coverage_rows: int = 64
    layer: int = 0
    text: str = "needle"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.structure not in STRUCTURES:
            raise ValueError(unknown("structure of bench attention:", self.structure, STRUCTURES))
        if self.shapes == []:
            raise ValueError("bench.shapes must name heads such as [32/8/128], or be null")
        if not 0 < self.sharpness <= MAX_SHARPNESS:
            raise ValueError(
                f"bench.sharpness must be positive, at most {MAX_SHARPNESS:g}, got {self.sharpness}"
            )
        if self.densities == PUBLISHED:
            self.densities_by_length = True
        elif self.densities_by_length and len(self.densities or ()) != len(self.lengths):
            raise ValueError(
                "bench.densities_by_length needs one density per length, got "
                f"{self.densities} for {self.lengths}"
            )
        if self.coverage_rows < 0:
            raise ValueError(f"bench.coverage_rows must be at least 0, got {self.coverage_rows}")

    @classmethod
    def uses_model(cls, settings: Mapping[str, Any]) -> bool:
        """See the base class: only inputs captured from a model depend on it."""
        return settings.get("structure") == "model"

    @classmethod
    def input_files(cls, settings: Mapping[str, Any]) -> dict[str, Path]:
        """See the base class: only captured inputs begin with a text."""
        return text_files("text", settings["text"]) if cls.uses_model(settings) else {}

    def grid(self, shapes: Sequence[str]) -> list[tuple[str, int, float | None]]:
        """Shape, length and density of every cell; of a limited number the short ones."""
        cells = []
        for shape in shapes:
            for index, length in enumerate(self.lengths):
                densities: Sequence[float | None] = self.densities or [None]
                if self.densities_by_length:
                    densities = [self.density_of(index)]
                cells += [(shape, length, density) for density in densities]
        if self.limit is None:
            return cells
        return sorted(cells, key=lambda cell: cell[1])[: self.limit]

    def run(self, context: Context) -> None:
        """See the base class."""

        from experiments.models.load import resolve_device
        from experiments.timing.attention_timing import measure_cell
        from experiments.timing.dense_kernels import dense_kernels
        from experiments.timing.stopwatch import Effort, measure_rates

        device = resolve_device(self.device, "bench.device")
        dtype = resolve_dtype(self.dtype, device.type)
        rates = measure_rates(device, dtype)
        kernels = dense_kernels(device, self.dense)
        effort = Effort(self.seconds, self.min_rounds, self.max_rounds)
        methods = self.methods(context)
        capture = self._capturer(context) if self.structure == "model" else None
        shapes = self.shapes or [DEFAULT_SHAPE]
        if capture is not None:
            shapes = [self._shape_of(capture(self.lengths[0])[0])]
        grid = self.grid(shapes)
        context.announce(len(grid))
        for shape, length, density in grid:
            name = f"{shape}-N{length}-{'own' if density is None else f'{density:.4f}'}"
            if name in context.done:
                continue
            inputs, is_truncated = (None, False) if capture is None else capture(length)
            if inputs is not None:
                length = inputs[0].shape[2]
            cell = self._cell(shape, length, density, dtype, device, context.cfg.seed)
            started = time.perf_counter()
            record = measure_cell(
                cell,
                methods,
                kernels,
                effort=effort,
                rates=rates,
                inputs=None if inputs is None else [inputs],
                coverage_rows=self.coverage_rows,
            )
            # Drawn inputs are what draws them.
            seen = (str(cell),) if inputs is None else inputs
            record["input_digest"] = input_digest(*seen)
            record["rates"] = rates.name
            if capture is not None:
                record |= {"num_prompts": 1, "num_truncated": int(is_truncated)}
            record["seconds"] = time.perf_counter() - started
            context.add({"sample_id": name, **record})
        self.failures = failures_of(context.records())

    def _cell(
        self, shape: str, length: int, density: float | None, dtype: Any, device: Any, seed: int
    ) -> Cell:
        from experiments.timing.cost_model import Shape
        from experiments.timing.inputs import Cell

        heads = Shape.parse(shape, element_size=dtype.itemsize)
        return Cell(heads, length, dtype, device, self.structure, density, seed, self.sharpness)

    def _capturer(self, context: Context) -> Callable[[int], tuple[Inputs, bool]]:
        """What takes q, k and v of a length from the run's model, and says if its text was cut."""
        from experiments.benches.coverage.texts import make_prompts
        from experiments.models.load import load_model, resolve_device
        from experiments.timing.captured_inputs import capture_inputs

        model = load_model(context.cfg.model)
        device = resolve_device(self.device, "bench.device")
        dtype = resolve_dtype(self.dtype, device.type)
        seed = context.cfg.seed

        def capture(length: int) -> tuple[Inputs, bool]:
            (prompt,) = make_prompts(self.text, model, lengths=[length], num_prompts=1, seed=seed)
            inputs = capture_inputs(model.model, prompt.ids, layer=self.layer)
            q, k, v = (x.to(device=device, dtype=dtype) for x in inputs)
            return (q, k, v), prompt.is_truncated

        return capture

    def _shape_of(self, inputs: Inputs) -> str:
        """Heads of captured inputs."""
        q, k, _ = inputs
        shape = f"{q.shape[1]}/{k.shape[1]}/{q.shape[3]}"
        if self.shapes not in (None, [shape]):
            raise ValueError(
                f"bench.structure=model has the model's own heads, {shape}, got bench.shapes="
                f"[{','.join(self.shapes)}]; leave bench.shapes out"
            )
        return shape


def resolve_dtype(name: str, device_type: str) -> Any:
    """The dtype of a name; "auto" is bfloat16 on a GPU and float32 on a CPU."""
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

"""``bench=gate``: is a method right? Its output against exact attention, many shapes, no times."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from experiments.benches.base import Bench, Context
from experiments.content import input_digest
from experiments.metrics import Metric
from experiments.store import Record


@dataclass(kw_only=True)
class GateBench(Bench):
    """The largest error of an output, over what its dtype and its plan allow, on sampled rows.

    Dense kernels are held against the same measure: what is wrong with one of them fails the run
    as well, since every speed-up is stated over it.

    Args:
        lengths: of queries and keys; one that no block size divides should be among them.
        shapes: heads as Hq/Hkv/D.
        dtypes: "auto" is bfloat16 on a GPU and float32 on a CPU.
        device: "auto" is a GPU if there is one.
        structure: of the drawn inputs: "random", "vertical", "slash" or "mixed".
        check_heads: query heads whose rows are checked.
    """

    needs_model: ClassVar[bool] = False
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("error_share", higher_is_better=False, interval=None, is_paired=False),
    )
    cells_by: ClassVar[tuple[str, ...]] = ("shape", "length", "dtype")

    lengths: list[int] = field(default_factory=lambda: [1000, 4096])
    shapes: list[str] = field(default_factory=lambda: ["8/2/128", "8/2/64", "8/2/96", "4/4/256"])
    dtypes: list[str] = field(default_factory=lambda: ["auto"])
    device: str = "auto"
    structure: str = "mixed"
    check_heads: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lengths", "shapes", "dtypes"):
            if not getattr(self, name):
                raise ValueError(f"bench.{name} must not be empty")
        if min(self.lengths) < 1:
            raise ValueError(f"bench.lengths must be positive numbers, got {self.lengths}")

    def run(self, context: Context) -> None:
        """See the base class."""
        from experiments.benches.attention import resolve_dtype
        from experiments.models.load import resolve_device
        from experiments.settings.names import describe
        from experiments.timing.attention_timing import measure_cell
        from experiments.timing.cost_model import Shape
        from experiments.timing.dense_kernels import dense_kernels
        from experiments.timing.inputs import Cell

        device = resolve_device(self.device, "bench.device")
        kernels = dense_kernels(device)
        label = describe(context.cfg.method)
        dtypes = [resolve_dtype(name, device.type) for name in self.dtypes]
        grid = [(s, n, t) for s in self.shapes for n in self.lengths for t in dtypes]
        grid = grid[: self.limit]
        context.announce(len(grid))
        for shape, length, dtype in grid:
            short = str(dtype).removeprefix("torch.")
            name = f"{shape}-N{length}-{short}"
            if name in context.done:
                continue
            started = time.perf_counter()
            heads = Shape.parse(shape, element_size=dtype.itemsize)
            cell = Cell(heads, length, dtype, device, self.structure, seed=context.cfg.seed)
            record = measure_cell(
                cell,
                {label: context.method},
                kernels,
                effort=None,
                coverage_rows=0,
                check_heads=self.check_heads,
                num_input_sets=1,
                stage_rounds=0,
            )
            entry = record["methods"].get(label, {})
            facts = {"density": entry.get("density"), "error_share": None}
            if "error" in entry:
                facts["error_share"] = entry["error"] / entry["allowed_error"]
            facts |= {"shape": shape, "input_digest": input_digest(str(cell))}
            facts |= {"seconds": time.perf_counter() - started}
            context.add({"sample_id": name, **record, **facts})
        for record in context.records():
            self.failures |= _failures(record)

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """See the base class; a gate is as good as its worst cell."""
        found = super().summarise(records)
        shares = [one["error_share"] for one in records if one["error_share"] is not None]
        found["total"]["error_share"] = max(shares, default=None)
        return found


def _failures(record: Record) -> dict[str, dict[str, str]]:
    """What was wrong or raised; a kernel that is not there, or no memory, is neither."""
    whole = {"inputs": record["failure"]} if "failure" in record else {}
    return {
        f"{record['sample_id']} {name}": {
            "type": entry["failure"],
            "message": entry["message"],
            "traceback": "",
        }
        for name, entry in {**record["dense"], **record["methods"], **whole}.items()
        if entry.get("failure") in ("incorrect", "error")
    }

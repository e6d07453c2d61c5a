"""Lengths from which a method was measured to be faster than dense attention, per device.

Legend: see :mod:`pbs.ops.grid`.
"""

from __future__ import annotations

import csv
import os
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

# Names a table of one's own, read before the one that comes with the package.
VARIABLE = "PBS_CROSSOVER"
PACKAGED = Path(__file__).with_name("crossover.csv")


@dataclass(frozen=True)
class Crossover:
    """One measured row.

    Attributes:
        device: as ``torch.cuda.get_device_name`` says.
        q_heads: Hq.
        kv_heads: Hkv.
        head_dim: D.
        method: name in ``METHODS``, with " shared" behind it for one order per key/value head.
        min_keys: keys from which the method was faster than the fastest dense kernel at every
            longer length measured; one more than the longest where it never was.
        setting: what was computed: the paper's densities, or what the method selected itself.
        source: commit that was measured.
    """

    device: str
    q_heads: int
    kv_heads: int
    head_dim: int
    method: str
    min_keys: int
    setting: str
    source: str


def read_table(path: Path) -> list[Crossover]:
    """Rows of a crossover table.

    Raises:
        ValueError: the file is not such a table.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        return [
            Crossover(
                row["device"],
                int(row["q_heads"]),
                int(row["kv_heads"]),
                int(row["head_dim"]),
                row["method"],
                int(row["min_keys"]),
                row["setting"],
                row["source"],
            )
            for row in rows
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a crossover table ({type(error).__name__}: {error}); make one with "
            "python -m experiments.crossover RESULTS --out FILE"
        ) from error


@lru_cache(maxsize=256)
def find_crossover(
    device: torch.device, q_heads: int, kv_heads: int, head_dim: int, method: str
) -> Crossover | None:
    """The row for a call; None, with one warning, if nobody has measured it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    own = os.environ.get(VARIABLE)
    for path in [*([Path(own)] if own else []), PACKAGED]:
        for row in read_table(path):
            shape = (row.q_heads, row.kv_heads, row.head_dim)
            if (row.device, shape, row.method) == (name, (q_heads, kv_heads, head_dim), method):
                return row
    warnings.warn(
        f"dense_below='auto': no crossover was measured for {method} on {name} with heads "
        f"{q_heads}/{kv_heads}/{head_dim}, so it runs sparse at every length; measure with "
        f"`make bench-gpu` and python -m experiments.crossover, then set {VARIABLE}",
        stacklevel=2,
    )
    return None

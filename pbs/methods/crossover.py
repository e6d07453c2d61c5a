"""Lengths from which a method was measured to be faster than dense attention, per device.

Legend: see :mod:`pbs.ops.grid`.
"""

from __future__ import annotations

import csv
import os
import warnings
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from pathlib import Path

import torch

from pbs.methods.names import METHODS

# Names a table of one's own, read before the one that comes with the package.
VARIABLE = "PBS_CROSSOVER"
PACKAGED = Path(__file__).with_name("crossover.csv")


# Parameters that say how a call is carried out and not what it computes.
NOT_SETTINGS = ("backend", "dense_below")


@dataclass(frozen=True)
class Crossover:
    """One measured row: a method at one setting and the density that it then has by itself.

    Attributes:
        device: as ``torch.cuda.get_device_name`` says.
        q_heads: Hq.
        kv_heads: Hkv.
        head_dim: D.
        method: name in ``METHODS`` with the parameters that are not at their defaults, as
            :func:`setting_of` has it, such as "pbs gqa=shared".
        min_keys: keys from which the method was faster than the fastest dense kernel at every
            longer length measured; one more than the longest where it never was.
        measured_keys: a length that was measured: the shortest of at least ``min_keys``, or the
            longest where there is none.
        density: tiles computed / causal tiles there, of what the method selected itself.
        method_ms: time of a call there, milliseconds of the device, median.
        dense_ms: time of the fastest dense kernel there.
        num_samples: calls behind the less often measured of all times that tell ``min_keys``.
        inputs: what was attended to.
        source: commit that was measured.
    """

    device: str
    q_heads: int
    kv_heads: int
    head_dim: int
    method: str
    min_keys: int
    measured_keys: int
    density: float
    method_ms: float
    dense_ms: float
    num_samples: int
    inputs: str
    source: str

    @property
    def key(self) -> tuple[str, int, int, int, str]:
        """What the row is about: device, heads, and method with its setting."""
        return self.device, self.q_heads, self.kv_heads, self.head_dim, self.method


def setting_of(method: object) -> str:
    """Name of a method and those of its parameters that are not at their defaults.

    Args:
        method: an :class:`pbs.methods.AttentionMethod`.
    """
    words = [METHODS.name_of(type(method)) or type(method).__name__]
    for entry in fields(method):  # type: ignore[arg-type]
        if not entry.init or entry.name in NOT_SETTINGS:
            continue
        made = entry.default_factory
        default = entry.default if made is MISSING else made()
        value = getattr(method, entry.name)
        if value != default:
            words.append(f"{entry.name}={value}")
    return " ".join(words)


def read_table(path: Path) -> list[Crossover]:
    """Rows of a crossover table.

    Raises:
        ValueError: the file is not such a table.
    """
    kinds = {"str": str, "int": int, "float": float}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [
                Crossover(**{one.name: kinds[str(one.type)](row[one.name]) for one in COLUMNS})
                for row in csv.DictReader(file)
            ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a crossover table ({type(error).__name__}: {error}); make one with "
            "python -m experiments.tools.measure_crossover RESULTS --out FILE"
        ) from error


COLUMNS = fields(Crossover)


@lru_cache(maxsize=256)
def find_crossover(
    device: torch.device, q_heads: int, kv_heads: int, head_dim: int, method: str
) -> Crossover | None:
    """The row for a call; None, with one warning, if nobody has measured it.

    A row is found for its exact setting only: another threshold makes another density, and the
    density decides. It was measured at the density that the method has by itself at that setting
    on generated inputs (``density``, ``inputs``); on inputs where the method selects less it is
    faster than dense attention from fewer keys on.

    Args:
        device: where the call runs.
        q_heads: Hq.
        kv_heads: Hkv.
        head_dim: D.
        method: as :func:`setting_of` has it.

    Raises:
        ValueError: a table is broken.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    own = os.environ.get(VARIABLE)
    key = (name, q_heads, kv_heads, head_dim, method)
    others = set()
    for path in [*([Path(own)] if own else []), PACKAGED]:
        for row in read_table(path):
            if row.key == key:
                return row
            if row.key[:4] == key[:4]:
                others.add(row.method)
    measured = f" (measured there: {', '.join(sorted(others))})" if others else ""
    warnings.warn(
        f"dense_below='auto': no crossover was measured for {method} on {name} with heads "
        f"{q_heads}/{kv_heads}/{head_dim}{measured}, so it runs sparse at every length; measure "
        "with `make bench-gpu` and python -m experiments.tools.measure_crossover, then set "
        f"{VARIABLE}, or say dense_below=N",
        stacklevel=2,
    )
    return None

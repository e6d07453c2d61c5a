"""What pictures, tables, the cost model and the tests must know of a method, stated beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Facts:
    """Facts about a method, the same at every setting.

    Attributes:
        label: its name in pictures.
        colour: in pictures, "#RRGGBB"; distinct to colour-blind eyes (most are of Okabe and Ito,
            the others of Paul Tol's "muted" scheme).
        marker: in pictures, one of matplotlib's; they differ as well, for prints in grey.
        selection: which count of :mod:`experiments.timing.cost_model` its selection has: "none",
            "pooled", "antidiagonal", "sampled", "last_queries", "flexprefill" or "prism".
        moves_keys: whether it orders and gathers keys.
        order_rows: how many queries all over a prompt of so many its order asks, each about the
            keys before it; None: a block of them, about all keys.
        is_row_local: whether a row of queries computes the same without the rows before it, so that
            a prompt in chunks gives what the whole gives, as far as the chunk's last row decides.
        row_local_with: parameters that this needs.
        curve: settings from sparse to dense that draw its curve of accuracy against density.
    """

    label: str
    colour: str
    marker: str
    selection: str
    moves_keys: bool = False
    order_rows: Callable[[int], int] | None = None
    is_row_local: bool = True
    row_local_with: Mapping[str, object] = field(default_factory=dict)
    curve: tuple[Mapping[str, object], ...] = ()


def at(name: str, *values: object) -> tuple[Mapping[str, object], ...]:
    """A curve of one parameter."""
    return tuple({name: value} for value in values)

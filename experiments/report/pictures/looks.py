"""Colours and markers belong to a method, the same in every picture; and how pictures are saved."""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from typing_extensions import override

from experiments.files import write_atomically
from pbs.methods import METHODS

DPI = 100
DENSE_METHOD = "flash"


class Look(NamedTuple):
    """How a method is drawn everywhere."""

    colour: str
    marker: str
    label: str


# As the methods say themselves, in the order of the registry.
LOOKS: dict[str, Look] = {
    name: Look(facts.colour, facts.marker, facts.label)
    for name in METHODS
    if (facts := METHODS.load(name).facts) is not None
}
# PBS by key order, and with one order per key/value head. Without a permutation it is MeanPooling,
# and in the paper's order the PBS of all other pictures: they have those colours.
ORDER_LOOKS: dict[str, Look] = {
    "none": Look(LOOKS["meanpool"].colour, "s", "no permutation"),
    "random": Look("#888888", "X", "random"),
    "random_query": Look("#AA4499", "<", "random queries"),
    "avg_query": Look("#332288", "^", "average query"),
    "last_block": Look(LOOKS["pbs"].colour, "o", "last block (PBS)"),
    "greedy": Look("#117733", "P", "greedy"),
    "adaptive": Look("#661100", "D", "adaptive"),
}
SHARED_LOOK = Look("#4422EE", "D", "shared by the group")
# For methods that the table does not know.
_SPARE_COLOURS = ("#332288", "#44AA99", "#AA4499", "#117733", "#661100", "#888888")
_SPARE_MARKERS = ("<", ">", "p", "d", "8", "H")


def look_of(method: str) -> Look:
    """Colour, marker and label of a method; an unknown name gets the same ones in every run."""
    if method in LOOKS:
        return LOOKS[method]
    number = zlib.crc32(method.encode())
    return Look(
        _SPARE_COLOURS[number % len(_SPARE_COLOURS)],
        _SPARE_MARKERS[number // len(_SPARE_COLOURS) % len(_SPARE_MARKERS)],
        method,
    )


def look_of_order(order: str) -> Look:
    """The look of PBS in a key order; an unknown one gets the same look in every run."""
    return ORDER_LOOKS.get(order, look_of(order))


def look_of_settings(settings: Mapping[str, Any]) -> Look:
    """The look of a method with its parameters (and "name"), told apart by what permutes the keys.

    PBS in another key order than its own has that order's look, PBS with one order per key/value
    head the look of sharing; everything else has its method's look.
    """
    if settings["name"] != "pbs":
        return look_of(settings["name"])
    order = settings.get("order", "last_block")
    if order != "last_block":
        return look_of_order(order)
    if settings.get("gqa") == "shared":
        return SHARED_LOOK
    return look_of("pbs")


class Percent(PercentFormatter):
    """Ticks of shares in percent, with as many decimals as their values have, and no more.

    Args:
        symbol: behind the number.
    """

    def __init__(self, symbol: str = "%") -> None:
        super().__init__(xmax=1.0, decimals=0, symbol=symbol)

    @override
    def format_ticks(self, values: Sequence[float]) -> list[str]:
        """All labels of an axis."""
        percent = [100 * value for value in values]
        exact = (n for n in range(5) if all(abs(round(x, n) - x) < 1e-6 for x in percent))
        self.decimals = next(exact, 5)
        return super().format_ticks(values)


def new_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches that needs no display and no global state."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: str | Path) -> Path:
    """Write a PNG, and the same as a PDF beside it, for papers; return where the PNG is.

    Whole or not at all, with missing folders. Equal pictures are equal files.
    """
    path = Path(path)
    for suffix, metadata in ((".pdf", {"CreationDate": None}), (path.suffix, None)):
        content = io.BytesIO()
        figure.savefig(content, format=suffix[1:], dpi=DPI, metadata=metadata)
        write_atomically(path.with_suffix(suffix), content.getvalue())
    return path

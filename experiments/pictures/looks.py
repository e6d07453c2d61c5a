"""Colours and markers belong to a method, the same in every picture; and how pictures are saved."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DPI = 100
DENSE_METHOD = "flash"


class Look(NamedTuple):
    """How a method is drawn everywhere."""

    colour: str
    marker: str
    label: str


# Most colours are those of Okabe and Ito, the others of Paul Tol's "muted" scheme: distinct to
# colour-blind eyes. The markers differ as well, for prints in grey.
LOOKS: dict[str, Look] = {
    "flash": Look("#000000", "*", "dense (flash)"),
    "pbs": Look("#D55E00", "o", "PBS"),
    "pbs_plus": Look("#882255", "D", "PBS+"),
    "meanpool": Look("#0072B2", "s", "MeanPooling"),
    "minference": Look("#009E73", "^", "MInference"),
    "xattention": Look("#CC79A7", "v", "XAttention"),
    "flexprefill": Look("#E69F00", "P", "FlexPrefill"),
    "streaming": Look("#56B4E9", "X", "StreamingLLM"),
    "prism": Look("#999933", "h", "Prism"),
}
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


def new_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches that needs no display and no global state."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: str | Path) -> Path:
    """Write the picture, with missing folders, and return where it is."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path

"""What was tried, by name; settings of :class:`experiments.tools.selection_lab.method.Lab`."""

from __future__ import annotations

import math
from dataclasses import replace

import yaml

from experiments.tools.selection_lab.method import Lab
from pbs.methods.base import AttentionMethod

BASE = Lab()
VARIANTS: dict[str, AttentionMethod] = {
    "base": BASE,
    "keys not moved": replace(BASE, order="none"),
    "keys moved only in heads that need fewer blocks so": replace(BASE, adapt=True),
    "order by the mean": replace(BASE, order_power=1.0),
    "order by power 2": replace(BASE, order_power=2.0),
    "order by power 8": replace(BASE, order_power=8.0),
    "order by the maximum": replace(BASE, order_power=math.inf),
    "order of 64 queries": replace(BASE, order_rows=64),
    "order of 256 queries": replace(BASE, order_rows=256),
    "order of every 16th query": replace(BASE, order_stride=16, order_rows=1 << 20),
    "order of every 8th query": replace(BASE, order_rows=1 << 20),
    "order of every 4th query": replace(BASE, order_stride=4, order_rows=1 << 20),
    "order by the selector's rows": replace(BASE, order="sampled"),
    "order by other queries in each head": replace(BASE, order_turn=True),
    "order by shares of all attention": replace(BASE, order_over="all"),
    "segment 512": replace(BASE, segment=512),
    "segment 2048": replace(BASE, segment=2048),
    "segment 4096": replace(BASE, segment=4096),
    "no neighbour compulsory": replace(BASE, local=0),
    "two neighbours compulsory": replace(BASE, local=2),
    "every 4th query sampled": replace(BASE, stride=4),
    "every 8th query sampled": replace(BASE, stride=8),
    "every 32nd query sampled": replace(BASE, stride=32),
    "sampled rows do not turn": replace(BASE, turn=False),
    "sampled rows turn inside tiles too": replace(BASE, jitter=True),
    "rows joined by the mean": replace(BASE, power=1.0),
    "rows joined by power 2": replace(BASE, power=2.0),
    "rows joined by power 8": replace(BASE, power=8.0),
    "rows joined by the maximum": replace(BASE, power=math.inf),
    "sampled scores alone": replace(BASE, share=0.0),
    "a quarter smooth": replace(BASE, share=0.25),
    "three quarters smooth": replace(BASE, share=0.75),
    "smooth scores alone": replace(BASE, share=1.0),
    "pooled by 8": replace(BASE, group=8),
    "pooled by 32": replace(BASE, group=32),
    "maximum of smooth and sampled": replace(BASE, join="maximum"),
    "geometric mean of smooth and sampled": replace(BASE, join="geometric"),
    "coarse to fine, half scored exactly": replace(BASE, screen=0.5),
    "coarse to fine, a third": replace(BASE, screen=1 / 3),
    "coarse to fine, a fifth": replace(BASE, screen=0.2),
    "best key of a block, half": replace(BASE, best_key=0.5),
    "best key of a block, alone": replace(BASE, best_key=1.0),
    "16 single columns a tile": replace(BASE, columns=16),
    "64 single columns a tile": replace(BASE, columns=64),
    "one slash a head": replace(BASE, slashes=1),
    "two slashes a head": replace(BASE, slashes=2),
    "one summary key": replace(BASE, summaries=1),
    "four summary keys": replace(BASE, summaries=4),
    "equal density of heads": replace(BASE, rule="head", level=0.2),
    "equal density of layers": replace(BASE, rule="layer", level=0.2),
    "one score for all": replace(BASE, rule="score", level=0.99),
    "coverage rises over the window": replace(BASE, slope=-0.5),
    "coverage falls over the window": replace(BASE, slope=0.5),
}


def parse(settings: str) -> Lab:
    """The defaults with other values, such as ``segment=512 order=none``."""
    pairs = dict(part.split("=", 1) for part in settings.split())
    return replace(BASE, **{name: yaml.safe_load(value) for name, value in pairs.items()})


def published() -> dict[str, AttentionMethod]:
    """Methods of the library whose knob is a share, for comparison on the same windows."""
    from pbs.methods import METHODS

    names = [name for name in METHODS if not name.endswith("_authors")]
    methods = {name: METHODS.load(name) for name in names}
    return {name: cls() for name, cls in methods.items() if cls.knob and not cls.knob.is_integer}

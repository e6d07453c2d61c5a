"""What a bench measures of each sample, declared once and read by whatever shows results.

A bench names its metrics (``Bench.metrics``). Tables, the comparison with dense attention, W&B, the
report, the leaderboard and the notebooks then show them: under which heading, with which interval,
paired or not, and which way is better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.statistics import student_interval, wilson_interval

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """A number of each sample, whose mean is a result.

    Attributes:
        name: key of the records, of ``results["total"]`` and of its ``cells``; the mean's interval
            lies beside it there as ``<name>_low`` and ``<name>_high``.
        unit: "%" for shares, which are stored as 0 to 1 and shown as 0 to 100; "points" for scores
            of 0 to 100; else the word behind the numbers, such as "nats"; "" for none.
        higher_is_better: which way is better.
        decimals: of the printed number.
        interval: 95 % interval of the mean: "wilson" of answers that are right (1) or wrong (0),
            "student" of anything else, None for none.
        is_paired: whether it is compared with dense attention, sample by sample.
    """

    name: str
    unit: str = ""
    higher_is_better: bool = True
    decimals: int = 2
    interval: str | None = "student"
    is_paired: bool = True

    @property
    def heading(self) -> str:
        """Of its column."""
        return f"{self.name}, {self.unit}" if self.unit not in ("", "points") else self.name

    @property
    def factor(self) -> float:
        """From stored to shown."""
        return 100.0 if self.unit == "%" else 1.0

    @property
    def difference_unit(self) -> str:
        """Of the difference to dense."""
        return "points" if self.unit in ("%", "points") else self.unit

    @property
    def difference_factor(self) -> float:
        """From the stored difference to dense to the shown one: those of scores are shares."""
        return 100.0 if self.difference_unit == "points" else 1.0

    @property
    def keys(self) -> tuple[str, ...]:
        """Where the mean is stored, and the ends of the interval if it has one."""
        ends = (f"{self.name}_low", f"{self.name}_high")
        return (self.name, *(ends if self.interval else ()))

    def text(self, value: float, low: float | None = None, high: float | None = None) -> str:
        """A stored value with the interval it has: "0.52 [0.48, 0.56]"."""
        texts = [
            f"{self.factor * x:.{self.decimals}f}" for x in (value, low, high) if x is not None
        ]
        return f"{texts[0]} [{texts[1]}, {texts[2]}]" if len(texts) == 3 else texts[0]

    def difference_text(self, value: float, low: float | None, high: float | None) -> str:
        """A stored difference to dense with its interval: "+0.03 [-0.01, +0.07]"."""
        decimals = 1 if self.difference_unit == "points" else self.decimals
        shown = [x for x in (value, low, high) if x is not None]
        texts = [f"{self.difference_factor * x:+.{decimals}f}" for x in shown]
        return f"{texts[0]} [{texts[1]}, {texts[2]}]" if len(texts) == 3 else texts[0]

    def best_first(self, value: float | None) -> float:
        """A key to sort stored values by, the best first, those that are missing last."""
        if value is None or math.isnan(value):
            return math.inf
        return -value if self.higher_is_better else value


ACCURACY = Metric("accuracy", "%", decimals=1, interval="wilson")
SCORE = Metric("score", "points", interval=None)


def summarise_metrics(metrics: Sequence[Metric], records: Sequence[Record]) -> dict[str, Any]:
    """Means of the metrics over those samples that have them, with their intervals."""
    found: dict[str, Any] = {}
    for metric in metrics:
        values = [record[metric.name] for record in records if record.get(metric.name) is not None]
        found |= dict.fromkeys(metric.keys)
        if not values:
            continue
        found[metric.name] = math.fsum(values) / len(values)
        if metric.interval == "wilson":
            ends = wilson_interval(sum(map(bool, values)), len(values))
        elif metric.interval == "student" and len(values) > 1:
            ends = student_interval(values)
        else:
            continue
        found |= {metric.keys[1]: ends.low, metric.keys[2]: ends.high}
    return found


def metric_of(metrics: Sequence[Metric], rows: Sequence[Record]) -> Metric | None:
    """The first of the metrics that any of these rows has; None if there is none."""
    return next(
        (one for one in metrics if any(row.get(one.name) is not None for row in rows)), None
    )

"""Ratios of the times of two runs on the same samples, and how sure they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.statistics import Interval, quantiles

CONFIDENCE = 0.95


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Interval of a median from the order of the values, whatever their distribution.

    Args:
        values: independent measurements.
        confidence: at least this much, in (0, 1).

    Returns:
        The k-th smallest and k-th largest value, for the largest k whose tails together hold less
        than 1 - ``confidence`` of the binomial distribution; None if there is none: at 95 %, below
        six values.
    """
    from scipy.stats import binom

    ordered = sorted(values)
    k = int(binom.ppf((1 - confidence) / 2, len(ordered), 0.5))
    while k > 0 and 2 * binom.cdf(k - 1, len(ordered), 0.5) > 1 - confidence:
        k -= 1
    return Interval(ordered[k - 1], ordered[-k]) if k > 0 else None


def compare_paired_times(dense: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """How many times faster the second is, from pairs of the same sample.

    Returns:
        ``speed_up``, the median of the ratios, with ``speed_up_low`` and ``speed_up_high``, its
        95 % interval over the samples (None for fewer than six), and ``speed_up_pairs``. What
        changed between two runs made one after another is not in the interval.
    """
    ratios = [slow / fast for slow, fast in zip(dense, ours, strict=True)]
    interval = median_interval(ratios)
    return {
        "speed_up": quantiles(ratios).median,
        "speed_up_low": interval.low if interval else None,
        "speed_up_high": interval.high if interval else None,
        "speed_up_pairs": len(ratios),
    }

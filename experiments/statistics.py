"""Intervals and paired tests: how sure a difference between two methods is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, permutation_test
from scipy.stats import t as student

# Random sign patterns of the sign-flip test: p-values are multiples of about 1e-4.
NUM_RESAMPLES = 9999
# Fewer measurements than this have no 20th percentile: even the lowest of four lies above it.
FEWEST_FOR_PERCENTILES = 5
# How many sample ids an error message names.
NUM_NAMED = 5


@dataclass(frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class PairedComparison:
    """A method against dense attention on the same samples, right or wrong.

    Attributes:
        num_pairs: samples that both have.
        difference: accuracy of the method minus accuracy of dense, in [-1, 1].
        low: lower end of the interval of the difference.
        high: upper end.
        p_value: exact McNemar test, two-sided; 1 if no sample flipped.
        gained: ids of samples that only the method got right, sorted.
        lost: ids of samples that only dense got right, sorted.
        num_unpaired: samples that only one side has (0 unless asked to go on without them).
    """

    num_pairs: int
    difference: float
    low: float
    high: float
    p_value: float
    gained: tuple[str, ...]
    lost: tuple[str, ...]
    num_unpaired: int = 0

    @property
    def flipped(self) -> tuple[str, ...]:
        """Ids of all samples whose answer changed between right and wrong, sorted."""
        return tuple(sorted(self.gained + self.lost))


@dataclass(frozen=True)
class PairedScores:
    """A method against dense attention on the same samples, with a score each.

    Attributes:
        num_pairs: samples that both have.
        difference: mean score of the method minus mean score of dense, in [-1, 1].
        low: lower end of the interval of the difference, at least -1.
        high: upper end, at most 1; ``low < high`` even if no sample differs.
        p_value: sign-flip permutation test of the mean difference, two-sided; 1 if nothing changed
            and for a single pair.
        num_better: samples with a higher score than dense.
        num_worse: samples with a lower score.
        num_unpaired: samples that only one side has (0 unless asked to go on without them).
    """

    num_pairs: int
    difference: float
    low: float
    high: float
    p_value: float
    num_better: int
    num_worse: int
    num_unpaired: int = 0


@dataclass(frozen=True)
class PairedValues:
    """A method against dense attention on the same samples, with a value each that has no bounds.

    Attributes:
        num_pairs: samples that both have.
        difference: mean of the method minus mean of dense, in the values' unit.
        low: lower end of Student's interval of the difference; None for one pair, and where no pair
            differs, of which an interval of zero width would say too much.
        high: upper end.
        p_value: sign-flip permutation test of the mean difference, two-sided; 1 where ``low`` is
            None.
        num_higher: samples with a higher value than dense.
        num_lower: samples with a lower one.
    """

    num_pairs: int
    difference: float
    low: float | None
    high: float | None
    p_value: float
    num_higher: int
    num_lower: int


@dataclass(frozen=True)
class Quantiles:
    """Median, 20th and 80th percentile of repeated measurements, in their unit.

    The percentiles are None for fewer than ``FEWEST_FOR_PERCENTILES`` measurements.
    """

    median: float
    p20: float | None
    p80: float | None


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of an accuracy; inside [0, 1] and never of zero width.

    Args:
        correct: right answers, 0 to ``total``.
        total: answers, at least 1.
        confidence: in (0, 1).

    Raises:
        ValueError: counts that are no integers, negative, or more right answers than answers;
            no answers at all; a confidence outside (0, 1).

    Source: Wilson (1927), J. Am. Stat. Assoc. 22:209, without continuity correction.
    """
    _check_confidence(confidence)
    for name, count in (("correct", correct), ("total", total)):
        if isinstance(count, bool) or not isinstance(count, int | np.integer):
            raise ValueError(f"{name} must be an integer count, got {count!r}")
    if not 0 <= correct <= total or total == 0:
        raise ValueError(
            f"expected 0 <= correct <= total and total > 0, got {correct} of {total} samples"
        )
    interval = binomtest(int(correct), int(total)).proportion_ci(confidence, method="wilson")
    return Interval(float(interval.low), float(interval.high))


def compare_paired(
    ours: Mapping[str, bool],
    dense: Mapping[str, bool],
    confidence: float = 0.95,
    *,
    partial: bool = False,
) -> PairedComparison:
    """Compare right and wrong answers sample by sample.

    The p-value is McNemar's exact test: a binomial test of the flipped samples against a fair coin.
    The interval is Newcombe's method 10 ("square and add"), which keeps a width when no sample
    flipped: 50 samples, half of them right, with equal answers still allow +-3.8 points.

    Args:
        ours: sample id to "answered correctly", of the method.
        dense: the same of dense attention.
        confidence: of the interval, in (0, 1).
        partial: compare the samples that both have and count the others, instead of raising.

    Raises:
        ValueError: no common sample, a value that is neither true nor false, a confidence outside
            (0, 1), or, unless ``partial``, samples that only one side has.

    Source: Newcombe (1998), Statistics in Medicine 17:2635-2650, method 10.
    """
    _check_confidence(confidence)
    ids, num_unpaired = _common_ids(ours, dense, partial)
    left = {sample: _as_bool(ours[sample], sample) for sample in ids}
    right = {sample: _as_bool(dense[sample], sample) for sample in ids}
    gained = tuple(sample for sample in ids if left[sample] and not right[sample])
    lost = tuple(sample for sample in ids if right[sample] and not left[sample])
    num_both = sum(left[sample] and right[sample] for sample in ids)
    num_neither = len(ids) - num_both - len(gained) - len(lost)
    interval = newcombe_interval(num_both, len(gained), len(lost), num_neither, confidence)
    num_flipped = len(gained) + len(lost)
    p_value = float(binomtest(len(gained), num_flipped).pvalue) if num_flipped else 1.0
    return PairedComparison(
        num_pairs=len(ids),
        difference=(len(gained) - len(lost)) / len(ids),
        low=interval.low,
        high=interval.high,
        p_value=p_value,
        gained=gained,
        lost=lost,
        num_unpaired=num_unpaired,
    )


def newcombe_interval(
    both: int, only_first: int, only_second: int, neither: int, confidence: float = 0.95
) -> Interval:
    """Interval of the difference of two paired proportions, first minus second.

    The Wilson intervals of the two proportions are squared and added as for independent samples,
    less what the correlation phi of the pairs (with a continuity correction) explains.

    Args:
        both: pairs where both are right.
        only_first: pairs where only the first is right.
        only_second: pairs where only the second is right.
        neither: pairs where both are wrong.
        confidence: in (0, 1).

    Raises:
        ValueError: no pairs, a negative count, or a confidence outside (0, 1).

    Source: Newcombe (1998), Statistics in Medicine 17:2635-2650, method 10.
    """
    total = both + only_first + only_second + neither
    if min(both, only_first, only_second, neither) < 0 or total == 0:
        raise ValueError(
            "expected four counts that are not negative and not all 0, got "
            f"{both}, {only_first}, {only_second}, {neither}"
        )
    num_first, num_second = both + only_first, both + only_second
    first, second = num_first / total, num_second / total
    first_limits = wilson_interval(num_first, total, confidence)
    second_limits = wilson_interval(num_second, total, confidence)
    covariance = both * neither - only_first * only_second
    if covariance > 0:
        covariance = max(covariance - total / 2, 0)
    margins = num_first * (total - num_first) * num_second * (total - num_second)
    phi = covariance / math.sqrt(margins) if margins else 0.0

    def distance(towards_first: float, towards_second: float) -> float:
        correlated = 2 * phi * towards_first * towards_second
        return math.sqrt(max(towards_first**2 - correlated + towards_second**2, 0))

    difference = (only_first - only_second) / total
    return Interval(
        difference - distance(first - first_limits.low, second_limits.high - second),
        difference + distance(first_limits.high - first, second - second_limits.low),
    )


def compare_paired_scores(
    ours: Mapping[str, float],
    dense: Mapping[str, float],
    confidence: float = 0.95,
    *,
    weights: Mapping[str, float] | None = None,
    partial: bool = False,
    seed: int = 0,
) -> PairedScores:
    """Compare scores between 0 and 1 (F1, ROUGE, edit similarity) sample by sample.

    Args:
        ours: sample id to score in [0, 1], of the method.
        dense: the same of dense attention.
        confidence: of the interval, in (0, 1).
        weights: sample id to what the sample counts in the mean, above 0, for every common sample;
            only their ratios matter. Default: all the same.
        partial: compare the samples that both have and count the others, instead of raising.
        seed: of the test where it samples; equal seeds give equal numbers.

    Raises:
        ValueError: no common sample, a score that is not in [0, 1], a missing weight or one that is
            not above 0, a confidence outside (0, 1), or, unless ``partial``, samples that only one
            side has.

    Source: the interval is that of :func:`mean_difference_interval`; the test flips the signs of
    the differences (all 2^n ways if they are few, else 9999 random ones).
    """
    _check_confidence(confidence)
    ids, num_unpaired = _common_ids(ours, dense, partial)
    left = _shares([ours[sample] for sample in ids], "score of the method")
    right = _shares([dense[sample] for sample in ids], "score of dense attention")
    factors = _factors(ids, weights)
    differences = factors * (left - right)
    interval = mean_difference_interval(differences, confidence, largest=float(factors.max()))
    p_value = 1.0
    if differences.any() and len(ids) > 1:
        p_value = _sign_flip_test(differences, seed)
    return PairedScores(
        num_pairs=len(ids),
        difference=float(differences.mean()),
        low=max(interval.low, -1.0),
        high=min(interval.high, 1.0),
        p_value=p_value,
        num_better=int((differences > 0).sum()),
        num_worse=int((differences < 0).sum()),
        num_unpaired=num_unpaired,
    )


def mean_difference_interval(
    differences: Sequence[float] | np.ndarray, confidence: float = 0.95, *, largest: float = 1.0
) -> Interval:
    """Interval of the mean of bounded differences, for any number of them from one on.

    Student's interval of the differences and of two more, one pair that gains and one that loses as
    much as a pair can. So it keeps a width where no pair differs, about that of the rule of three
    (+-3 / n of ``largest``); one pair allows everything; and it holds its confidence where few
    pairs lose much, which the bootstrap and Student's own interval do not. Among many pairs the two
    do not matter; few differences that are all small get a wider interval than they need.

    Args:
        differences: of the pairs, each in ``[-largest, largest]``.
        confidence: in (0, 1).
        largest: the largest difference that a pair can show, above 0.

    Raises:
        ValueError: no difference, one that is not finite or beyond ``largest``, or a confidence
            outside (0, 1).

    Source: Bonett and Price (2012), J. Educ. Behav. Stat. 37:479-488, for two paired proportions
    (differences of -1, 0 and 1), there with the normal quantile, which is too narrow below n = 10.
    """
    _check_confidence(confidence)
    values = _finite(differences, "difference")
    if not np.abs(values).max() <= largest:
        raise ValueError(
            f"every difference must lie in [-{largest:g}, {largest:g}], got "
            f"{values[np.abs(values).argmax()]:g}; pass the largest possible one as `largest`"
        )
    values = np.append(values, [largest, -largest])
    quantile = float(student.ppf((1 + confidence) / 2, len(values) - 1))
    half = quantile * float(values.std(ddof=1)) / math.sqrt(len(values))
    mean = float(values.mean())
    return Interval(max(mean - half, -largest), min(mean + half, largest))


def student_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's interval of a mean; of zero width if all values are the same.

    Args:
        values: at least 2.
        confidence: in (0, 1).

    Raises:
        ValueError: fewer than 2 values, one that is not finite, or a confidence outside (0, 1).
    """
    _check_confidence(confidence)
    finite = _finite(values, "value")
    if len(finite) < 2:
        raise ValueError(f"expected at least 2 values for an interval, got {len(finite)}")
    quantile = float(student.ppf((1 + confidence) / 2, len(finite) - 1))
    half = quantile * float(finite.std(ddof=1)) / math.sqrt(len(finite))
    mean = float(finite.mean())
    return Interval(mean - half, mean + half)


def compare_paired_values(
    ours: Mapping[str, float],
    dense: Mapping[str, float],
    confidence: float = 0.95,
    *,
    seed: int = 0,
) -> PairedValues:
    """Compare values that have no bounds (a loss, a divergence) sample by sample.

    Args:
        ours: sample id to value, of the method.
        dense: the same of dense attention, of the same samples.
        confidence: of the interval, in (0, 1).
        seed: of the test where it samples.

    Raises:
        ValueError: no sample, samples that only one side has, a value that is not finite, or a
            confidence outside (0, 1).
    """
    ids, _ = _common_ids(ours, dense, partial=False)
    left = _finite([ours[sample] for sample in ids], "value of the method")
    right = _finite([dense[sample] for sample in ids], "value of dense attention")
    differences = left - right
    low = high = None
    p_value = 1.0
    if len(ids) > 1 and differences.any():
        interval = student_interval(differences.tolist(), confidence)
        low, high = interval.low, interval.high
        p_value = _sign_flip_test(differences, seed)
    return PairedValues(
        num_pairs=len(ids),
        difference=float(differences.mean()),
        low=low,
        high=high,
        p_value=p_value,
        num_higher=int((differences > 0).sum()),
        num_lower=int((differences < 0).sum()),
    )


def _sign_flip_test(differences: np.ndarray, seed: int) -> float:
    """Two-sided p of the mean difference: all 2^n signs if they are few, else 9999 random ones."""
    found = permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=NUM_RESAMPLES,
        batch=_batch(len(differences)),
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def quantiles(samples: Sequence[float]) -> Quantiles:
    """Median, 20th and 80th percentile, interpolated linearly.

    Raises:
        ValueError: no samples, or one that is not finite.
    """
    values = _finite(samples, "measurement")
    median, p20, p80 = map(float, np.quantile(values, [0.5, 0.2, 0.8]))
    if len(values) < FEWEST_FOR_PERCENTILES:
        return Quantiles(median, None, None)
    return Quantiles(median, p20, p80)


def format_spread(
    text: Callable[[float], str], median: float, low: float | None, high: float | None, num: int
) -> str:
    """A median with its percentiles, "6.07 [6.01, 6.20]", or "6.07 (n = 2)" if ``num`` is too few.

    Args:
        text: how a measurement is written.
        median: of the measurements.
        low: their 20th percentile.
        high: their 80th percentile.
        num: how many there are.
    """
    if num < FEWEST_FOR_PERCENTILES or low is None or high is None:
        return f"{text(median)} (n = {num})"
    return f"{text(median)} [{text(low)}, {text(high)}]"


def _common_ids(
    ours: Mapping[str, object], dense: Mapping[str, object], partial: bool
) -> tuple[list[str], int]:
    """Ids of both sides, sorted, and how many samples only one side has."""
    common = sorted(ours.keys() & dense.keys())
    unpaired = {
        "the method": sorted(ours.keys() - dense.keys()),
        "dense attention": sorted(dense.keys() - ours.keys()),
    }
    num_unpaired = sum(map(len, unpaired.values()))
    if num_unpaired and not partial:
        found = "; ".join(
            f"only {side} has {len(ids)}: {', '.join(ids[:NUM_NAMED])}"
            + (", ..." if len(ids) > NUM_NAMED else "")
            for side, ids in unpaired.items()
            if ids
        )
        raise ValueError(
            f"expected the same samples on both sides, but {found}. Finish both runs, or pass "
            "partial=True to compare the common samples"
        )
    if not common:
        raise ValueError(
            f"no sample to compare: got {len(ours)} of the method and {len(dense)} of dense "
            "attention, none in common"
        )
    return common, num_unpaired


def _as_bool(value: object, sample: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"expected True or False for sample {sample!r}, got {value!r}")
    return bool(value)


def _shares(values: Sequence[float], what: str) -> np.ndarray:
    array = _finite(values, what)
    bad = np.flatnonzero((array < 0) | (array > 1))
    if bad.size:
        raise ValueError(
            f"every {what} must lie in [0, 1], got {array[bad[0]]:g} at index {bad[0]}; divide "
            "scores by the best possible one"
        )
    return array


def _factors(ids: Sequence[str], weights: Mapping[str, float] | None) -> np.ndarray:
    """What each sample counts, 1 on average."""
    if weights is None:
        return np.ones(len(ids))
    missing = [sample for sample in ids if sample not in weights]
    if missing:
        raise ValueError(
            f"expected a weight for each of {len(ids)} samples, missing {len(missing)}: "
            f"{', '.join(missing[:NUM_NAMED])}"
        )
    array = _finite([weights[sample] for sample in ids], "weight")
    if not array.min() > 0:
        raise ValueError(f"every weight must be above 0, got {array.min():g}")
    return array / array.mean()


def _finite(values: Sequence[float] | np.ndarray, what: str) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"expected a list of at least one {what}, got shape {array.shape}")
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise ValueError(
            f"every {what} must be finite, got {array[bad[0]]} at index {bad[0]} "
            f"({bad.size} of {array.size} are not)"
        )
    return array


def _batch(num_pairs: int) -> int:
    """Resamples at a time: some tens of MB."""
    return max(1, min(NUM_RESAMPLES, 2_000_000 // num_pairs))


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:  # also refuses NaN
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}; try 0.95")

"""Statistics against published worked examples and brute-force enumeration."""

from itertools import product
from math import comb, factorial, sqrt

import numpy as np
import pytest

from experiments.statistics import (
    Interval,
    compare_paired,
    compare_paired_scores,
    newcombe_interval,
    quantiles,
    wilson_interval,
)


def pairs(both, gained, lost, neither):
    """Answers of the method and of dense attention with these counts."""
    kinds = [(True, True)] * both + [(True, False)] * gained
    kinds += [(False, True)] * lost + [(False, False)] * neither
    ids = [f"s{i:04d}" for i in range(len(kinds))]
    ours = {name: kind[0] for name, kind in zip(ids, kinds, strict=True)}
    dense = {name: kind[1] for name, kind in zip(ids, kinds, strict=True)}
    return ours, dense


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (81, 263), (29, 29), (1, 1)])
def test_wilson_interval_solves_its_equation(correct, total):
    interval = wilson_interval(correct, total)
    p, z = correct / total, 1.959963984540054
    for end in (interval.low, interval.high):
        if 0 < end < 1:
            assert abs(p - end) == pytest.approx(z * sqrt(end * (1 - end) / total), rel=1e-9)
    assert 0 <= interval.low <= p <= interval.high <= 1
    assert interval.low < interval.high


def test_wilson_interval_matches_newcombes_published_example():
    # Newcombe (1998), Statistics in Medicine 17:857-872, table I, method 3: 81 of 263.
    interval = wilson_interval(81, 263)
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize(
    ("correct", "total"), [(-1, 3), (4, 3), (0, 0), (1.0, 3), (True, 3), (float("nan"), 3)]
)
def test_wilson_interval_refuses_wrong_counts(correct, total):
    with pytest.raises(ValueError, match=r"correct|total"):
        wilson_interval(correct, total)


@pytest.mark.parametrize("confidence", [0, 1, -0.5, float("nan")])
def test_wilson_interval_refuses_wrong_confidence(confidence):
    with pytest.raises(ValueError, match="confidence must lie in"):
        wilson_interval(1, 2, confidence)


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        # Altman et al. (2000), Statistics with Confidence, p. 52: 0.12, from 0.011 to 0.226.
        ((14, 5, 0, 22), 0.011, 0.226),
        # Fagerland et al. (2014), airway hyper-responsiveness: -0.286, from -0.507 to -0.026.
        ((1, 1, 7, 12), -0.507, -0.026),
    ],
    ids=["altman", "fagerland"],
)
def test_paired_interval_matches_published_examples(counts, low, high):
    comparison = compare_paired(*pairs(*counts))
    assert comparison.difference == pytest.approx((counts[1] - counts[2]) / sum(counts))
    assert (round(comparison.low, 3), round(comparison.high, 3)) == (low, high)


def test_paired_interval_covers_the_truth_by_enumeration():
    """Exact coverage over all tables of 14 pairs stays near 95 % and never collapses."""
    total = 14
    tables = [t for t in product(range(total + 1), repeat=3) if sum(t) <= total]
    intervals = {t: newcombe_interval(*t, total - sum(t)) for t in tables}
    coverages = []
    for both, gained, lost in [(0.8, 0.02, 0.05), (0.5, 0.1, 0.1), (0.9, 0.0, 0.05), (0.3, 0.2, 0)]:
        truth, neither = gained - lost, 1 - both - gained - lost
        covered = 0.0
        for (a, b, c), interval in intervals.items():
            if interval.low <= truth <= interval.high:
                d = total - a - b - c
                ways = factorial(total) // (
                    factorial(a) * factorial(b) * factorial(c) * factorial(d)
                )
                covered += ways * both**a * gained**b * lost**c * neither**d
        coverages.append(covered)
    assert min(coverages) > 0.92
    assert np.mean(coverages) > 0.945


def test_equal_answers_still_leave_an_interval():
    for counts in [(50, 0, 0, 0), (25, 0, 0, 25), (0, 0, 0, 3)]:
        comparison = compare_paired(*pairs(*counts))
        assert comparison.difference == 0
        assert comparison.p_value == 1
        assert comparison.low < -0.5 / sum(counts)
        assert comparison.high > 0.5 / sum(counts)
    assert comparison.flipped == ()


def test_mcnemar_is_the_exact_binomial_test():
    comparison = compare_paired(*pairs(30, 2, 9, 4))
    by_hand = 2 * sum(comb(11, k) for k in range(3)) / 2**11
    assert comparison.p_value == pytest.approx(by_hand)
    assert (comparison.num_pairs, len(comparison.gained), len(comparison.lost)) == (45, 2, 9)


def test_swapping_the_sides_mirrors_the_comparison():
    ours, dense = pairs(30, 2, 9, 4)
    forth, back = compare_paired(ours, dense), compare_paired(dense, ours)
    assert back.difference == -forth.difference
    assert (back.low, back.high) == (pytest.approx(-forth.high), pytest.approx(-forth.low))
    assert back.gained == forth.lost
    assert back.flipped == forth.flipped


def test_flipped_samples_are_named():
    ours = {"a": True, "b": False, "c": True, "d": False}
    dense = {"a": True, "b": True, "c": False, "d": True}
    comparison = compare_paired(ours, dense)
    assert comparison.gained == ("c",)
    assert comparison.lost == ("b", "d")
    assert comparison.flipped == ("b", "c", "d")


@pytest.mark.parametrize("compare", [compare_paired, compare_paired_scores])
def test_unpaired_samples_are_an_error_unless_asked_for(compare):
    ours = dict.fromkeys(("a", "b", "only1", "only2"), True)
    dense = dict.fromkeys(("a", "b", "other"), True)
    with pytest.raises(
        ValueError, match=r"only the method has 2: only1, only2; only dense .* 1: o"
    ):
        compare(ours, dense)
    comparison = compare(ours, dense, partial=True)
    assert (comparison.num_pairs, comparison.num_unpaired) == (2, 3)


@pytest.mark.parametrize("compare", [compare_paired, compare_paired_scores])
def test_nothing_to_compare_is_an_error(compare):
    with pytest.raises(ValueError, match="no sample to compare"):
        compare({}, {})
    with pytest.raises(ValueError, match="no sample to compare"):
        compare({"a": True}, {"b": True}, partial=True)


@pytest.mark.parametrize("value", [float("nan"), None, 1, "yes"])
def test_answers_must_be_true_or_false(value):
    with pytest.raises(ValueError, match="True or False for sample 'a'"):
        compare_paired({"a": value}, {"a": True})


def test_newcombe_interval_refuses_impossible_counts():
    for counts in [(0, 0, 0, 0), (-1, 2, 3, 4)]:
        with pytest.raises(ValueError, match="four counts"):
            newcombe_interval(*counts)


def test_score_interval_is_near_the_normal_one_for_many_samples():
    rng = np.random.default_rng(1)
    dense = {str(i): float(x) for i, x in enumerate(rng.uniform(0, 1, 400))}
    noise = rng.normal(0.03, 0.2, 400)
    ours = {name: score + float(noise[int(name)]) for name, score in dense.items()}
    comparison = compare_paired_scores(ours, dense)
    half = 1.96 * noise.std(ddof=1) / sqrt(400)
    assert comparison.difference == pytest.approx(noise.mean())
    assert comparison.low == pytest.approx(noise.mean() - half, abs=0.15 * half)
    assert comparison.high == pytest.approx(noise.mean() + half, abs=0.15 * half)
    assert comparison == compare_paired_scores(ours, dense)
    assert comparison.num_better + comparison.num_worse == 400


def test_sign_flip_test_is_exact_for_few_samples():
    """All 2^6 sign patterns: the observed sum and its mirror are the only ones as extreme."""
    dense = dict.fromkeys("abcdef", 0.0)
    ours = dict(zip("abcdef", [1.0, 2, 3, 4, 5, 6], strict=True))
    assert compare_paired_scores(ours, dense).p_value == pytest.approx(2 / 64)


def test_equal_scores_have_no_spread_and_say_so():
    scores = {"a": 0.5, "b": 0.25, "c": 1.0}
    comparison = compare_paired_scores(scores, scores)
    assert (comparison.low, comparison.high, comparison.p_value) == (0, 0, 1)
    assert (comparison.num_better, comparison.num_worse) == (0, 0)


def test_scores_must_be_finite():
    with pytest.raises(ValueError, match="score of the method must be finite, got nan at index 1"):
        compare_paired_scores({"a": 1.0, "b": float("nan")}, {"a": 1.0, "b": 1.0})


def test_quantiles_are_those_of_the_samples():
    result = quantiles([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (result.p20, result.median, result.p80) == (2.0, 3.5, 5.0)


@pytest.mark.parametrize("samples", [[], [1.0, float("nan")], [float("inf")], [[1.0], [2.0]]])
def test_quantiles_refuse_what_is_no_list_of_numbers(samples):
    with pytest.raises(ValueError, match="measurement"):
        quantiles(samples)


def test_interval_is_a_value():
    assert Interval(0.1, 0.2) == Interval(0.1, 0.2)

"""Statistics against published worked examples and brute-force enumeration."""

from itertools import product
from math import comb, factorial, sqrt

import numpy as np
import pytest

from experiments.statistics import (
    Interval,
    compare_paired,
    compare_paired_scores,
    format_spread,
    mean_difference_interval,
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


def scores(*values):
    return {f"s{i:04d}": float(value) for i, value in enumerate(values)}


def test_score_interval_is_near_the_normal_one_for_many_samples():
    rng = np.random.default_rng(1)
    dense = rng.uniform(0.2, 0.8, 2000)
    ours = np.clip(dense + rng.normal(0.03, 0.2, 2000), 0, 1)
    comparison = compare_paired_scores(scores(*ours), scores(*dense))
    half = 1.96 * (ours - dense).std(ddof=1) / sqrt(2000)
    assert comparison.difference == pytest.approx((ours - dense).mean())
    assert comparison.low == pytest.approx((ours - dense).mean() - half, abs=0.02 * half)
    assert comparison.high == pytest.approx((ours - dense).mean() + half, abs=0.02 * half)
    assert comparison == compare_paired_scores(scores(*ours), scores(*dense))
    assert comparison.num_better + comparison.num_worse == 2000


def test_score_interval_is_students_with_one_pair_more_on_either_side():
    # Counts of Fagerland et al. (2014); 2.0739 is Student's 97.5 % quantile for 22 degrees.
    gained, lost, total = (1 + 1) / 23, (7 + 1) / 23, 21 + 2
    variance = (gained + lost - (gained - lost) ** 2) * total / (total - 1)
    half = 2.0738730679040147 * sqrt(variance / total)
    interval = mean_difference_interval([0] * 13 + [1] + [-1] * 7)
    assert interval.low == pytest.approx(gained - lost - half)
    assert interval.high == pytest.approx(gained - lost + half)


# How a method's scores may differ from dense attention's: samples of a size, and their mean.
DIFFERENCES = {
    "normal": (lambda rng, n: np.clip(rng.normal(-0.03, 0.2, n), -1, 1), -0.03),
    "skewed": (lambda rng, n: -rng.beta(0.5, 4, n), -0.5 / 4.5),
    "ties": (lambda rng, n: rng.choice([-1.0, 0, 1], n, p=[0.3, 0.6, 0.1]), -0.2),
    "one-way": (lambda rng, n: rng.choice([-1.0, 0], n, p=[0.16, 0.84]), -0.16),
    "rare": (lambda rng, n: rng.choice([-1.0, 0], n, p=[0.05, 0.95]), -0.05),
    "mostly zero": (lambda rng, n: np.where(rng.random(n) < 0.8, 0, -rng.random(n)), -0.1),
}


@pytest.mark.parametrize("kind", DIFFERENCES)
@pytest.mark.parametrize("num", [2, 3, 5, 10, 20, 50])
def test_score_interval_holds_its_confidence_from_two_samples_on(num, kind):
    rng = np.random.default_rng(3)
    draw, truth = DIFFERENCES[kind]
    intervals = [mean_difference_interval(draw(rng, num)) for _ in range(600)]
    assert np.mean([one.low <= truth <= one.high for one in intervals]) > 0.93


@pytest.mark.parametrize("num", [2, 5, 10, 20, 50])
def test_score_interval_holds_its_confidence_at_every_rate_of_losses(num):
    """Exact coverage over the number of samples that lose all."""
    intervals = [mean_difference_interval([-1.0] * k + [0.0] * (num - k)) for k in range(num + 1)]
    for rate in np.linspace(0.005, 0.995, 199):
        covered = sum(
            comb(num, k) * rate**k * (1 - rate) ** (num - k)
            for k, interval in enumerate(intervals)
            if interval.low <= -rate <= interval.high
        )
        assert covered > 0.93


def test_one_pair_of_scores_allows_everything():
    comparison = compare_paired_scores({"a": 0.5}, {"a": 0.75})
    assert comparison.difference == -0.25
    assert comparison.p_value == 1
    assert (comparison.low, comparison.high) == (-1, 1)


@pytest.mark.parametrize("num", [3, 12, 75, 1000])
def test_equal_scores_leave_an_interval_near_the_rule_of_three(num):
    same = scores(*([0.5, 0.25, 1.0] * num)[:num])
    comparison = compare_paired_scores(same, same)
    assert (comparison.difference, comparison.p_value) == (0, 1)
    assert (comparison.num_better, comparison.num_worse) == (0, 0)
    assert comparison.high == -comparison.low
    # A share of samples that differ above which 95 % of such runs would have shown one.
    assert 0.9 * (1 - 0.05 ** (1 / num)) < comparison.high < 3 / num


def test_equal_differences_other_than_zero_leave_an_interval_too():
    comparison = compare_paired_scores(scores(*[0.5] * 10), scores(*[0.75] * 10))
    assert comparison.low < -0.25 < comparison.high
    assert comparison.high - comparison.low > 0.2


def test_weighted_scores_average_by_their_weights():
    ours, dense = scores(0.5, 0.25, 0.75), scores(1.0, 0.25, 0.5)
    weights = {"s0000": 1.0, "s0001": 1.0, "s0002": 2.0}
    comparison = compare_paired_scores(ours, dense, weights=weights)
    assert comparison.difference == pytest.approx((-0.5 + 2 * 0.25) / 4)
    assert (comparison.num_better, comparison.num_worse) == (1, 1)
    same = dict.fromkeys(weights, 1.0)
    assert compare_paired_scores(ours, dense, weights=same) == compare_paired_scores(ours, dense)


def test_a_mean_that_rests_on_one_sample_is_as_uncertain_as_it():
    """100 equal samples of one task say nothing about another task with one sample."""
    same = scores(*[0.5] * 101)
    weights = dict.fromkeys(same, 0.5 / 100) | {"s0100": 0.5}
    comparison = compare_paired_scores(same, same, weights=weights)
    assert comparison.high > 0.9
    assert compare_paired_scores(same, same).high < 0.03


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 1.0, "b": 0.0}, {"a": 1.0, "b": -1.0}])
def test_every_sample_needs_a_weight_above_zero(weights):
    both = {"a": 0.5, "b": 0.5}
    with pytest.raises(ValueError, match="weight"):
        compare_paired_scores(both, both, weights=weights)


def test_sign_flip_test_is_exact_for_few_samples():
    """All 2^6 sign patterns: the observed sum and its mirror are the only ones as extreme."""
    ours, dense = scores(0.1, 0.2, 0.3, 0.4, 0.5, 0.6), scores(*[0] * 6)
    assert compare_paired_scores(ours, dense).p_value == pytest.approx(2 / 64)


def test_scores_must_be_shares():
    with pytest.raises(ValueError, match="score of the method must be finite, got nan at index 1"):
        compare_paired_scores({"a": 1.0, "b": float("nan")}, {"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match=r"score of dense .* must lie in \[0, 1\], got 50"):
        compare_paired_scores({"a": 1.0}, {"a": 50.0})


@pytest.mark.parametrize(("differences", "largest"), [([0.5, -2.0], 1.0), ([0.5], 0.25)])
def test_differences_beyond_the_largest_possible_one_are_refused(differences, largest):
    with pytest.raises(ValueError, match="every difference must lie in"):
        mean_difference_interval(differences, largest=largest)


def test_quantiles_are_those_of_the_samples():
    result = quantiles([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (result.p20, result.median, result.p80) == (2.0, 3.5, 5.0)


@pytest.mark.parametrize("samples", [[3.0], [1.0, 5.0], [1.0, 3.0, 3.0, 5.0]])
def test_few_measurements_have_a_median_and_no_percentiles(samples):
    result = quantiles(samples)
    assert (result.p20, result.median, result.p80) == (None, 3.0, None)


def test_a_spread_says_how_many_if_they_are_too_few():
    def text(value):
        return f"{value:.1f}"

    assert format_spread(text, 2.0, 1.0, 3.0, 5) == "2.0 [1.0, 3.0]"
    assert format_spread(text, 2.0, None, None, 2) == "2.0 (n = 2)"
    assert format_spread(text, 2.0, 2.0, 2.0, 1) == "2.0 (n = 1)"


@pytest.mark.parametrize("samples", [[], [1.0, float("nan")], [float("inf")], [[1.0], [2.0]]])
def test_quantiles_refuse_what_is_no_list_of_numbers(samples):
    with pytest.raises(ValueError, match="measurement"):
        quantiles(samples)


def test_interval_is_a_value():
    assert Interval(0.1, 0.2) == Interval(0.1, 0.2)

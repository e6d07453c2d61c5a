"""Values of a knob: spread over its range, or chosen for densities."""

from itertools import pairwise

import pytest

from experiments.benches.coverage.settings import (
    MAX_PASSES,
    TOLERANCE,
    find_values,
    settings_of,
    spread_values,
)
from pbs.methods import Knob

THRESHOLD = Knob("threshold", low=0.001, high=1.0)
TOKENS = Knob("n_local", low=1, high=1 << 20, is_integer=True)


def test_values_end_at_the_dense_end_and_crowd_there():
    values = spread_values(THRESHOLD, 5, longest=8192)
    assert values == sorted(values)
    assert values[-1] == 1.0
    steps = [b - a for a, b in pairwise(values)]
    assert steps == sorted(steps, reverse=True)
    assert spread_values(THRESHOLD, 0, longest=8192) == []


def test_a_knob_that_lowers_density_crowds_at_its_low_end():
    values = spread_values(Knob("x", 0.0, 1.0, increases_density=False), 4, longest=1)
    assert values == [0.0, 0.062, 0.25, 0.562]


def test_counts_are_spread_by_ratio_up_to_the_longest_prompt():
    assert spread_values(TOKENS, 3, longest=4096) == [16, 256, 4096]


def measure_with(density):
    """A model whose density is a function of the knob, and the passes it has made."""
    passes = []

    def measure(values):
        passes.append(list(values))
        return [density(value) for value in values]

    return measure, passes


@pytest.mark.parametrize(
    ("knob", "density"),
    [
        (THRESHOLD, lambda value: value**2),
        (THRESHOLD, lambda value: min(1.0, 20 * value)),
        (Knob("x", 0.0, 1.0, increases_density=False), lambda value: 1 - value),
        (TOKENS, lambda value: min(1.0, value / 8192)),
    ],
    ids=["square", "steep", "falling", "tokens"],
)
def test_values_are_found_for_all_densities_in_few_passes(knob, density):
    measure, passes = measure_with(density)
    targets = [0.1, 0.5, 0.8]
    values = find_values(measure, knob, targets)
    assert [density(value) for value in values] == pytest.approx(targets, abs=TOLERANCE)
    assert len(passes) <= MAX_PASSES
    tried = [value for each in passes for value in each]
    assert len(tried) == len(set(tried))


def test_densities_out_of_reach_get_the_nearest_end():
    measure, passes = measure_with(lambda value: 0.2 + 0.3 * value)
    assert find_values(measure, THRESHOLD, [0.1, 0.9]) == [0.001, 1.0]
    assert len(passes) == 1


def test_a_jump_over_the_density_ends_the_search():
    measure, passes = measure_with(lambda value: 0.1 if value < 5 else 0.9)
    (value,) = find_values(measure, Knob("count", 1, 16, is_integer=True), [0.4])
    assert value < 5, "0.1 is nearer to 0.4 than 0.9"
    assert len(passes) < MAX_PASSES
    assert {4, 5} <= {tried for each in passes for tried in each}


def test_the_own_setting_comes_first_and_not_twice():
    settings = settings_of({"name": "pbs", "threshold": 0.9}, [0.5, 0.9, 1.0])
    assert [(each.value, each.is_own) for each in settings] == [
        (0.9, True),
        (0.5, False),
        (1.0, False),
    ]
    assert settings[1].method.threshold == 0.5
    chosen = settings_of({"name": "pbs", "threshold": 0.9}, [0.9], targets=[0.4])
    assert [(each.value, each.target) for each in chosen] == [(0.9, None), (0.9, 0.4)]


def test_a_preset_without_the_knob_has_no_value():
    (own, *others) = settings_of({"name": "minference", "preset": "paper"}, [0.3])
    assert own.value is None
    assert [each.value for each in others] == [0.3]
    assert others[0].method.preset == "adaptive"


def test_counts_stay_whole_and_keep_their_proportion():
    settings = settings_of({"name": "streaming", "n_init": 1024, "n_local": 4096}, [512.0])
    assert (settings[1].method.n_local, settings[1].method.n_init) == (512, 128)

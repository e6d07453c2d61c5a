"""Curves, densities at equal coverage and the verdict on heads, by hand-made records."""

import pandas as pd
import pytest

from experiments.benches.coverage.points import (
    compare_heads,
    density_at,
    head_densities,
    mean_curve,
    points_of,
    summarise_coverage,
)


def record_of(prompt="a", layer=0, length=1024, points=(), heads=(0, 1)):
    """Points are (value, is own, densities, coverages)."""
    named = ("value", "is_own", "density", "coverage")
    return {
        "prompt": prompt,
        "length": length,
        "layer": layer,
        "heads": list(heads),
        "points": [dict(zip(named, point, strict=True)) for point in points],
    }


POINTS = [
    (0.9, True, [0.4, 0.6], [0.9, 0.8]),
    (0.5, False, [0.2, 0.4], [0.6, 0.4]),
    (1.0, False, [1.0, 1.0], [1.0, 1.0]),
]


def test_points_have_a_row_per_head_and_value():
    points = points_of([record_of(points=POINTS)])
    assert len(points) == 6
    row = points[(points["head"] == 1) & (points["value"] == 0.5)].iloc[0]
    assert (row["density"], row["coverage"], row["is_own"]) == (0.4, 0.4, False)


def test_the_summary_is_the_own_setting_with_the_curve_beside_it():
    other = [(value, own, [0.0, 0.0], [0.0, 0.0]) for value, own, *_ in POINTS]
    records = [record_of(points=POINTS), record_of(layer=3, length=2048, points=other)]
    summary = summarise_coverage(records)
    assert summary["total"]["num_samples"] == 2
    assert summary["total"]["density"] == pytest.approx(0.25)
    assert summary["total"]["coverage"] == pytest.approx(0.425)
    assert summary["by_length"]["1024"]["coverage"] == pytest.approx(0.85)
    assert summary["by_layer"]["3"]["density"] == 0
    curve = summary["by_length"]["1024"]["curve"]
    assert [point["knob_value"] for point in curve] == [0.5, 0.9, 1.0]
    assert [point["coverage"] for point in curve] == pytest.approx([0.5, 0.85, 1.0])
    assert len(summary["cells"]) == 6
    assert summary["cells"][0]["length"] == 1024
    assert [cell["is_own"] for cell in summary["cells"]].count(True) == 2


def test_values_chosen_for_a_density_are_averaged_by_that_density():
    records = [
        record_of(prompt, points=[(None, True, [1.0], [1.0]), (value, False, [0.3], [cover])])
        for prompt, value, cover in (("a", 0.01, 0.5), ("b", 0.03, 0.7))
    ]
    for record in records:
        record["heads"] = [0]
        record["points"][1]["target"] = 0.3
    curve = mean_curve(points_of(records))
    assert curve["coverage"].tolist() == pytest.approx([0.6, 1.0])
    assert curve["value"].iloc[0] == pytest.approx(0.02)
    assert curve["value"].isna().iloc[1]
    total = summarise_coverage(records)["total"]["curve"]
    assert total[0]["target"] == 0.3
    assert total[1]["knob_value"] is total[1]["target"] is None


def curve_of(*points):
    return pd.DataFrame(points, columns=["density", "coverage"])


def test_density_at_a_coverage_is_linear_between_points():
    curve = curve_of((0.1, 0.5), (0.3, 0.9), (1.0, 1.0))
    assert density_at(curve, 0.7) == pytest.approx(0.2)
    assert density_at(curve, 0.9) == pytest.approx(0.3)
    assert density_at(curve, 0.95) == pytest.approx(0.65)
    assert density_at(curve, 1.0) == pytest.approx(1.0)
    assert density_at(curve, 0.4) == 0.1, "less is not on the curve"


def test_the_first_of_equal_coverages_counts():
    assert density_at(curve_of((0.1, 0.5), (0.3, 1.0), (1.0, 1.0)), 1.0) == pytest.approx(0.3)


def test_a_coverage_that_is_not_reached_is_refused():
    with pytest.raises(ValueError, match=r"coverage 0.95 is not reached: .* 0.9000"):
        density_at(curve_of((0.1, 0.5), (0.3, 0.9)), 0.95)


def head_points(densities, prompt="a"):
    """Heads that need these densities for coverage 0.9, from a straight line."""
    points = [
        (0.5, True, [0.5 * density for density in densities], [0.8] * len(densities)),
        (1.0, False, [1.5 * density for density in densities], [1.0] * len(densities)),
    ]
    return points_of([record_of(prompt, points=points, heads=range(len(densities)))])


def test_heads_are_helped_unchanged_or_harmed():
    before, after = head_points([0.3, 0.3, 0.3]), head_points([0.2, 0.304, 0.31])
    heads = compare_heads(before, after, coverage=0.9)
    assert heads["change"].tolist() == pytest.approx([-0.1, 0.004, 0.01])
    assert heads["verdict"].tolist() == ["helped", "unchanged", "harmed"]
    strict = compare_heads(before, after, coverage=0.9, tolerance=0.001)
    assert strict["verdict"].tolist() == ["helped", "harmed", "harmed"]


def test_prompts_are_averaged_after_interpolation():
    both = pd.concat([head_points([0.2]), head_points([0.4], prompt="b")])
    assert head_densities(both, 0.9).tolist() == pytest.approx([0.3])


def test_other_heads_cannot_be_compared():
    with pytest.raises(ValueError, match="same prompts, layers and heads"):
        compare_heads(head_points([0.3]), head_points([0.3, 0.4]), coverage=0.9)

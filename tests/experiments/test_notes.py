"""What stands under a table: on what coverage was measured, which prompts lost a part."""

from experiments.notes import coverage_facts, describe_coverage, describe_truncation, notes_of


def record_of(coverage=0.9, layers=(0, 1, 3), rows=64, heads=None):
    return {
        "coverage": coverage,
        "layer_coverage": {str(layer): coverage for layer in layers},
        "coverage_rows": rows,
        "coverage_heads": heads,
    }


def test_coverage_says_samples_layers_heads_and_queries():
    records = [record_of(), {"density": 0.5}, record_of(rows=32)]
    facts = coverage_facts(records)
    assert facts == {
        "num_coverage_samples": 2,
        "coverage_layers": [0, 1, 3],
        "coverage_heads": None,
        "coverage_rows": 64,
    }
    expected = "2 of 3 samples, layers 0, 1, 3, all heads, at most 64 queries of each"
    assert describe_coverage({"num_samples": 3, **facts}) == expected


def test_many_layers_and_heads_are_named_as_ranges():
    facts = coverage_facts([record_of(layers=range(32), heads=[7, 0, 1, 2])])
    text = describe_coverage({"num_samples": 1, **facts})
    assert "layers 0-31, heads 0-2, 7, at most" in text


def test_records_of_earlier_versions_say_what_they_can():
    facts = coverage_facts([{"coverage": 0.9, "layer_coverage": {"0": 0.9}}])
    text = describe_coverage({"num_samples": 1, **facts})
    assert text == "1 of 1 samples, layers 0, all heads"


def test_no_coverage_says_nothing():
    assert coverage_facts([{"density": 0.5}]) == {"num_coverage_samples": 0}
    assert describe_coverage({"num_samples": 1, "num_coverage_samples": 0}) is None
    assert describe_coverage({"num_samples": 1}) is None


def test_truncated_prompts_are_counted_by_cell():
    cells = [
        {"task": "vt", "length": 2048, "num_samples": 2, "num_truncated": 2},
        {"task": "fwe", "length": 2048, "num_samples": 4, "num_truncated": 1},
        {"task": "cwe", "length": 2048, "num_samples": 2, "num_truncated": 0},
        {"task": "broken", "num_samples": 0, "score": None},
    ]
    expected = "3 of 8 prompts (vt 2048: 2 of 2, fwe 2048: 1 of 4), of whose text a part is missing"
    assert describe_truncation({"cells": cells}) == expected
    assert describe_truncation({"cells": cells[2:]}) is None
    assert describe_truncation({"cells": []}) is None


def test_prompts_that_several_cells_share_count_once():
    cells = [
        {"length": 512, "layer": layer, "num_samples": 3, "num_truncated": 1} for layer in (0, 1)
    ]
    assert describe_truncation({"cells": cells}).startswith("1 of 3 prompts (512: 1 of 3),")
    cell = {"length": 512, "num_prompts": 2, "num_truncated": 2, "num_samples": 1}
    assert describe_truncation({"cells": [cell]}).startswith("2 of 2 prompts (512: 2 of 2),")


def test_runs_that_rest_on_the_same_share_a_note():
    rows = [
        {"label": "flash", "coverage_basis": "x"},
        {"label": "pbs", "coverage_basis": "x", "truncated": "z"},
    ]
    assert notes_of(rows) == [
        "coverage: x",
        "truncated (pbs): z",
    ]
    rows[0]["coverage_basis"] = "y"
    assert notes_of(rows)[:2] == ["coverage (flash): y", "coverage (pbs): x"]

"""docs/findings.md, docs/results.md and README.md say what the lab's committed results say."""

import pandas as pd
import pytest

from experiments.tools.readme import PAGE
from experiments.tools.selection_lab.tables import (
    FINDINGS,
    FOLDER,
    METHODS,
    OURS,
    README,
    densities_at,
    headline,
    rewrite,
)

QUARTERS = ["kl_q1", "kl_q2", "kl_q3", "kl_q4"]


def test_the_tables_are_those_of_the_committed_results():
    text = FINDINGS.read_text()
    assert rewrite(text) == text
    text = README.read_text()
    assert rewrite(text, headline) == text


@pytest.mark.parametrize(("file", "number"), [("densities_8192", 10), ("all_32768", 4)])
def test_every_method_was_measured_on_the_same_windows(file, number):
    rows = pd.read_csv(FOLDER / f"{file}.csv")
    windows = rows.groupby(["variant", "target"]).window.agg(tuple)
    assert set(map(len, windows)) == {number}
    assert len(set(windows)) == 1


def test_it_is_nearer_to_dense_than_every_other_method_in_every_quarter():
    rows = pd.read_csv(FOLDER / "densities_8192.csv")
    mean = rows.groupby(["variant", "target"])[QUARTERS].mean()
    lab = {OURS, "keys not moved", "every 8th query sampled", "one summary key"}
    others = set(rows.variant) - lab
    assert {"pbs", "xattention", "minference", "meanpool", "flexprefill"} <= others <= set(METHODS)
    for name, target in mean.index:
        if name in others:
            assert (mean.loc[(name, target)] > mean.loc[(OURS, target)]).all(), (name, target)


def test_the_results_page_says_the_same():
    said = " ".join(PAGE.read_text().split())
    found = {}
    for length, file in ((8192, "densities_8192"), (32768, "all_32768")):
        rows = pd.read_csv(FOLDER / f"{file}.csv")
        mean = rows[rows.target == 0.2].groupby("variant").kl.mean()
        found[length] = [f"{mean[name]:.4f}" for name in (OURS, "pbs", "keys not moved")]
    ours, published, still = found[8192]
    assert f"is {ours}, a fifth of published PBS ({published}) and half of" in said
    assert f"left in place ({still}); at 32768 tokens {', '.join(found[32768][:2])} and" in said
    assert f"and {found[32768][2]}." in said


def test_densities_of_a_distance_lie_between_those_measured():
    rows = pd.DataFrame(
        {
            "window": ["a"] * 3 + ["b"] * 2 + ["c"] * 2,
            "density": [0.1, 0.4, 0.2, 0.1, 0.2, 0.1, 0.2],
            "kl": [0.2, 0.01, 0.05, 0.4, 0.1, 0.04, 0.01],
        }
    )
    found = densities_at(rows, 0.1)
    assert found == pytest.approx({"a": 0.1 * 2**0.5})  # halfway; b's last is not below
    assert densities_at(rows, 0.02).keys() == {"a", "c"}

"""What docs/results.md says about who is ahead follows from the answers that come with it."""

import re
from itertools import permutations

import pandas as pd
import pytest

from experiments.results import load
from experiments.statistics import compare_paired
from experiments.tools.readme import PAGE, RESULTS

ANSWERS = RESULTS / "needle_2026-11-26" / "4k_8k_answers.csv"
# What `make readme` writes is not typed.
GENERATED = re.compile(r"<!-- begin (\w+) -->.*?<!-- end \1 -->", re.DOTALL)
DIFFERENCE = re.compile(r"[+-]\d+\.\d\s\[[+-]\d+\.\d,\s[+-]\d+\.\d\]")


@pytest.fixture(scope="module")
def answers():
    return pd.read_csv(ANSWERS, index_col="sample_id").astype(bool)


def sentences():
    """The typed text, on one line."""
    return " ".join(GENERATED.sub("", PAGE.read_text()).split())


def test_every_stated_difference_is_one_of_two_runs_of_the_answers(answers):
    runs = {label: column.to_dict() for label, column in answers.items()}
    known = set()
    for ours, theirs in permutations(runs.values(), 2):
        paired = compare_paired(ours, theirs)
        ends = (paired.difference, paired.low, paired.high)
        known.add("{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * one for one in ends)))
    stated = DIFFERENCE.findall(sentences())
    assert len(stated) >= 5
    assert set(stated) <= known


def test_the_answers_are_those_of_the_runs_beside_them(answers):
    runs = pd.read_csv(ANSWERS.with_name("4k_8k.csv"))
    labels = [
        row.method if row.setting == "default" else f"{row.method} {row.setting}"
        for row in runs.itertuples()
    ]
    assert labels == list(answers)
    assert (100 * answers.mean()).tolist() == pytest.approx(runs["score"].tolist())
    assert (runs["num_samples"] == len(answers)).all()
    assert not runs["is_dirty"].any()


def test_the_page_says_what_no_model_here_has_shown():
    assert "models of 8B parameters and prompts of 128K; no weights of that size" in sentences()


def test_the_pages_heads_are_those_of_the_committed_table_6():
    table = RESULTS / "smollm2_2026-11-26" / "coverage" / "smollm2" / "table6.md"
    shares = re.search(r"\| smollm2 \| ([\d.]+)% \| ([\d.]+)% \| ([\d.]+)% \|", table.read_text())
    helped, unchanged, harmed = shares.groups()
    said = (
        f"lowers the density that {helped} % of the 270 heads need, leaves {unchanged} % as they "
    )
    assert said in sentences()
    assert f"and raises {harmed} %" in sentences()


def test_the_pages_ruler_scores_are_the_committed_ones():
    runs = load(RESULTS / "smollm2_2026-11-26")
    scores = runs[runs["bench"] == "ruler"].groupby("method")["score"].mean()
    assert f"scores {scores['flash']:.1f} dense and {scores['pbs']:.1f} with PBS" in sentences()

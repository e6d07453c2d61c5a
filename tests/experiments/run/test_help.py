"""The help text: whole sentences, and every parameter with its meaning."""

import subprocess
import sys

import pytest

from experiments.run.help import explain_parameters, list_groups, parameters_of
from experiments.settings.bench_names import BENCHES
from experiments.settings.config import ROOT
from pbs.methods import METHODS
from pbs.orders import ORDERS
from pbs.selectors import SELECTORS

CLASSES = [(one, name) for one in (METHODS, BENCHES, ORDERS, SELECTORS) for name in one]


@pytest.mark.parametrize(("registry", "name"), CLASSES)
def test_every_parameter_has_a_meaning(registry, name):
    found = {field.name: text for field, text in parameters_of(registry.load(name))}
    assert [parameter for parameter, text in found.items() if not text] == []


def test_options_are_explained_in_whole_sentences():
    text = list_groups()
    entries = [line for line in text.splitlines() if line.startswith("    ")]
    starts = [i for i, line in enumerate(entries) if line[4] != " "]
    for begin, end in zip(starts, [*starts[1:], len(entries)], strict=True):
        sentence = " ".join(entries[begin:end]).rstrip()
        assert sentence.endswith("."), sentence
        assert max(map(len, entries)) <= 110


def test_chosen_options_parameters_are_listed():
    text = explain_parameters(
        ["method=pbs", "order=spread", "bench=needle", "model=tiny", "method=?"]
    )
    assert "method.threshold=0.9\n        cumulative block probability to reach" in text
    assert "method.order_params.stride=8" in text
    assert "bench.lengths=[1024, 4096, 8192]\n        prompt plus answer" in text
    assert explain_parameters(["model=tiny", "method=none", "method=pbs_authors"]) == ""
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "method=xattention_authors", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    # Of that option's file, not of the class.
    assert "method.stride=16\n        s, divides B; larger is cheaper" in done.stdout

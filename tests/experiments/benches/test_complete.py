"""A bench is one file and one config; what else is missing is named here."""

import pytest

from experiments.benches.base import Bench
from experiments.settings.bench_names import BENCHES, ELSEWHERE, class_of
from experiments.settings.config import CONF

# What their results are is no mean of a number per sample.
WITHOUT_METRICS = {"attention", "coverage", "ttft"}


def missing(name):
    """What the bench of this name still needs, a sentence each that says where it goes."""
    found = []
    try:
        bench = BENCHES.load(name)
    except (ImportError, AttributeError, ValueError) as error:
        return [
            f"experiments/benches/{name}.py: a class {class_of(name).partition(':')[2]} ({error})"
        ]
    if not issubclass(bench, Bench):
        found.append(f"{bench.__module__}: {bench.__name__} must derive from Bench")
    if name not in WITHOUT_METRICS and not bench.metrics:
        found.append(f"{bench.__module__}: metrics = (Metric(...),), see experiments.metrics")
    if not (CONF / "debug" / "sizes" / "fast" / f"{name}.yaml").is_file():
        found.append(f"conf/debug/sizes/fast/{name}.yaml: sizes that take seconds")
    return found


@pytest.mark.parametrize("name", BENCHES)
def test_nothing_is_missing(name):
    assert missing(name) == []


def test_what_a_new_bench_lacks_is_named_with_its_place(monkeypatch):
    monkeypatch.setitem(BENCHES._entries, "toy", "tests.experiments.benches.toy:ToyBench")
    assert [text.partition(":")[0] for text in missing("toy")] == ["conf/debug/sizes/fast/toy.yaml"]
    monkeypatch.setitem(BENCHES._entries, "nowhere", class_of("nowhere"))
    (sentence,) = missing("nowhere")
    assert sentence.startswith("experiments/benches/nowhere.py: a class NowhereBench")


def test_a_bench_is_found_by_its_config():
    assert {*BENCHES} == {path.stem for path in (CONF / "bench").glob("*.yaml")}
    assert {*ELSEWHERE} <= {*BENCHES}
    assert class_of("needle") == "experiments.benches.needle:NeedleBench"

"""What samples say: warm-up, cold samples of records, ratios round by round, counts in tables."""

import pytest
import torch

from experiments.report.times import Times, break_even_table, timing_table
from experiments.timing.samples import FEW_SAMPLES, num_cold, without_cold_samples
from experiments.timing.stopwatch import MOST_WARM_UP, Effort, Stopwatch, time_interleaved
from experiments.timing.timing_report import break_evens, table_rows

CPU = torch.device("cpu")


def timed(samples, **more):
    middle = sorted(samples)[len(samples) // 2] if samples else None
    return {"median_ms": middle, "samples_ms": samples, **more}


def record(length, ours, dense, **more):
    return {
        "length": length,
        "target_density": None,
        "dense": {"flash": timed(dense)},
        "methods": {"pbs": timed(ours, density=0.8, dense_reason="", **more)},
    }


class Clock:
    """A stopwatch that shows what it is told."""

    def __init__(self, readings, waits=()):
        self.readings, self.waits = iter(readings), iter(waits)
        self.device, self.holds, self.wall_ms = CPU, False, None

    def __call__(self, call):
        call()
        reading = next(self.readings)
        self.wall_ms = next(self.waits, reading)
        return reading


def test_a_cold_first_call_counts_for_nothing(monkeypatch):
    """12.5 ms, then 0.99: not a median of 6.75."""
    clock = Clock([12.5, 0.99, 1.0, 0.98, 1.02])
    monkeypatch.setattr("experiments.timing.stopwatch.Stopwatch", lambda *_, **__: clock)
    found = time_interleaved({"a": lambda _: None}, device=CPU, effort=Effort(1.0, 2, 2))["a"]
    assert found.dropped_ms == (12.5, 0.99, 1.0)
    assert found.samples_ms == (0.98, 1.02)
    assert found.is_warm
    assert found.to_dict()["dropped_ms"] == [12.5, 0.99, 1.0]


def test_calls_that_never_agree_are_marked(monkeypatch):
    clock = Clock([float(2**i) for i in range(MOST_WARM_UP)] + [5.0])
    monkeypatch.setattr("experiments.timing.stopwatch.Stopwatch", lambda *_, **__: clock)
    found = time_interleaved({"a": lambda _: None}, device=CPU, effort=Effort(1.0, 1, 1))["a"]
    assert len(found.dropped_ms) == MOST_WARM_UP
    assert not found.is_warm
    ours = {**found.to_dict(), "dense_reason": ""}
    one = {**record(8192, [], []), "dense": {}, "methods": {"pbs": ours}}
    shown = timing_table(Times("cells", "gpu", (without_cold_samples(one),)))
    assert "its calls never came to agree" in shown["samples"][0]


def test_a_call_made_earlier_is_the_first_of_the_warm_up(monkeypatch):
    clock = Clock([2.1, 2.0])
    monkeypatch.setattr("experiments.timing.stopwatch.Stopwatch", lambda *_, **__: clock)
    calls = {"a": lambda _: None}
    found = time_interleaved(calls, device=CPU, effort=Effort(1.0, 1, 1), earlier_ms={"a": 2.0})
    assert found["a"].dropped_ms == (2.0, 2.1)
    assert found["a"].samples_ms == (2.0,)


def test_every_variant_says_how_long_a_caller_waits():
    found = time_interleaved(
        {name: lambda _: torch.ones(10).sum() for name in ("dense", "method")},
        device=CPU,
        effort=Effort(0.01, 5, 5),
        holds=True,
    )
    for timing in found.values():
        entry = timing.to_dict()
        assert entry["num_samples"] == entry["num_wall_samples"] == 5
        assert entry["wall_p20_ms"] <= entry["wall_ms"] <= entry["wall_p80_ms"]
        assert "host_ms" not in entry


def test_a_held_device_is_let_go_to_see_how_long_a_caller_waits(monkeypatch):
    """The device's time and the wait are calls of their own, in every round, for every variant."""
    log = []

    class Held(Stopwatch):
        def __call__(self, call):
            super().__call__(call)
            log.append(self.holds)
            self.wall_ms = None if self.holds else 7.0
            return 1.0

    monkeypatch.setattr("experiments.timing.stopwatch.Stopwatch", Held)
    calls = {"dense": lambda _: None, "method": lambda _: None}
    found = time_interleaved(calls, device=CPU, effort=Effort(1.0, 2, 2), holds=True)
    assert log == [True] * 4 + [True, False] * 4
    for timing in found.values():
        assert timing.samples_ms == (1.0, 1.0)
        assert timing.wall_samples_ms == (7.0, 7.0)


def test_which_samples_are_cold():
    assert num_cold([12.5, 0.99]) == 2
    assert num_cold([7.6, 5.5, 5.5, 5.6]) == 1
    assert num_cold([190.4, 172.3]) == 0
    assert num_cold([5203.7]) == 1
    assert num_cold([5203.7], earlier=5196.4) == 0
    assert num_cold([5203.7], earlier=15_000.0) == 1


def test_records_made_without_the_rule_lose_their_cold_samples():
    found = without_cold_samples(record(8192, [12.5, 0.99], [1.7, 1.71], host_ms=3926.0))
    pbs = found["methods"]["pbs"]
    assert (pbs["median_ms"], pbs["failure"]) == (None, "cold")
    assert pbs["dropped_ms"] == [12.5, 0.99]
    assert "12.5, 0.99 ms" in pbs["message"]
    assert "host_ms" not in pbs
    assert break_evens([found]) == []
    later = without_cold_samples(record(16384, [9.0, 3.0, 3.1, 3.2], [6.0, 6.1, 6.2, 6.3]))
    pbs = later["methods"]["pbs"]
    assert pbs["samples_ms"] == [3.0, 3.1, 3.2]
    assert pbs["speed_up_over_fastest"] == later["dense"]["flash"]["median_ms"] / 3.1
    (point, _) = break_evens([found, later])
    assert point["break_even"] == 16384
    assert point["fewest_samples"] == 3


def test_ratios_have_percentiles_over_the_rounds():
    found = without_cold_samples(record(8192, [1.0, 1.1, 1.0, 1.1, 1.0], [2.0, 2.2, 2.0, 2.2, 2.0]))
    pbs = found["methods"]["pbs"]
    assert pbs["speed_up_p20"]["flash"] == pbs["speed_up_p80"]["flash"] == 2.0
    (_, row) = table_rows(found)
    assert row["speed_up_over_fastest_p20"] == 2.0


def test_few_rounds_have_a_median_and_no_percentiles():
    found = without_cold_samples(record(8192, [1.0, 1.1, 1.0], [2.0, 2.2, 2.0]))
    pbs = found["methods"]["pbs"]
    assert pbs["speed_up"]["flash"] == 2.0
    assert pbs["speed_up_p20"]["flash"] is None
    (_, row) = table_rows(found)
    assert row["num_samples"] == 3 < FEW_SAMPLES
    assert row["speed_up_over_fastest_p20"] is None
    ours = Times("cells", "gpu", (found,))
    assert "few samples: 3" in timing_table(ours)["samples"][1]
    assert break_even_table(ours)["fewest samples a time"].tolist() == [3, 3]


def test_a_caller_who_waits_has_a_speed_up_of_his_own():
    one = record(8192, [1.0] * 5, [2.0] * 5, wall_ms=4.0, dropped_ms=[])
    one["dense"]["flash"] |= {"wall_ms": 2.0, "dropped_ms": []}
    found = without_cold_samples(one)["methods"]["pbs"]
    assert found["speed_up_over_fastest"] == 2.0
    assert found["wall_speed_up_over_fastest"] == 0.5


@pytest.fixture
def gpu(monkeypatch):
    """A device that writes down what it is asked for, and says 3 ms."""
    log = []

    class Event:
        def __init__(self, **_):
            pass

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait for event")

        def elapsed_time(self, _):
            return 3.0

    class Scratch:
        def zero_(self):
            log.append("flush")

    monkeypatch.setattr("experiments.timing.stopwatch.torch.empty", lambda *_, **__: Scratch())
    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.synchronize", lambda *_: log.append("synchronise"))
    monkeypatch.setattr("torch.cuda._sleep", lambda *_: log.append("hold"))
    return log


def test_a_gpu_is_held_for_its_own_time_and_idle_before_a_wait(gpu):
    held, waiting = Stopwatch("cuda", holds=True), Stopwatch("cuda")
    assert held(lambda: gpu.append("call")) == 3.0
    assert gpu == ["flush", "hold", "record", "call", "record", "wait for event"]
    assert held.wall_ms is None
    gpu.clear()
    assert waiting(lambda: gpu.append("call")) == 3.0
    assert gpu == ["flush", "synchronise", "record", "call", "record", "wait for event"]
    assert 0 <= waiting.host_ms <= waiting.wall_ms < 3.0


def test_short_calls_are_measured_twice_and_long_ones_once(gpu, monkeypatch):
    calls = {"dense": lambda _: gpu.append("call"), "method": lambda _: gpu.append("call")}
    effort = Effort(1e-9, 5, 9)
    found = time_interleaved(calls, device="cuda", effort=effort, holds=True)
    assert all(len(one.samples_ms) == len(one.wall_samples_ms) == 5 for one in found.values())
    assert gpu.count("hold") == 2 * (2 + 5)
    assert gpu.count("synchronise") == 2 * 5
    gpu.clear()
    monkeypatch.setattr("experiments.timing.stopwatch.LONG_CALL_MS", 2.0)
    found = time_interleaved(calls, device="cuda", effort=effort, holds=True)
    assert gpu.count("hold") == 2 * 2  # the warm-up
    assert gpu.count("call") == 2 * (2 + 5)
    assert all(len(one.wall_samples_ms) == 5 for one in found.values())

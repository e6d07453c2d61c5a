"""Samples survive a kill, metrics are whole, and a run has one writer."""

import json
import math
import multiprocessing
import time

import pytest

from experiments.files import remove_scratch, to_json
from experiments.run_environments import environment_id
from experiments.store import RunStore


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "run")


def append(store, *ids):
    with store.appending() as appender:
        for name in ids:
            appender.append({"sample_id": name})


def ids(store):
    return [record["sample_id"] for record in store.samples()]


def test_samples_come_back_in_order(store):
    append(store, "a", "b")
    append(store, "c")
    assert ids(store) == ["a", "b", "c"]


def test_a_half_written_line_is_dropped_and_cut_off(store):
    append(store, "a")
    with store.samples_path.open("a") as file:
        file.write('{"sample_id": "b", "correct": tr')
    assert ids(store) == ["a"]
    append(store, "b")
    assert ids(store) == ["a", "b"]
    assert len(store.samples_path.read_text().splitlines()) == 2


def test_a_last_line_without_its_end_is_not_read_as_data(store):
    append(store, "a")
    with store.samples_path.open("a") as file:
        file.write('{"sample_id": "b"}')  # whole, but who knows
    assert ids(store) == ["a"]


def test_a_broken_line_in_the_middle_is_an_error(store):
    append(store, "a")
    with store.samples_path.open("a") as file:
        file.write("garbage\n")
    append(store, "b")
    with pytest.raises(ValueError, match="line 2 is broken"):
        store.samples()


def test_a_sample_counts_once(store):
    append(store, "a", "b", "a")
    assert ids(store) == ["a", "b"]


def test_json_has_no_nan():
    value = {"a": math.nan, "b": [math.inf, 1.0], 3: "x"}
    assert json.loads(to_json(value)) == {"a": None, "b": [None, 1.0], "3": "x"}


def test_metrics_are_replaced_as_a_whole(store):
    store.write_metrics({"status": "failed"})
    store.write_metrics({"status": "unreachable"})
    assert store.metrics() == {"status": "unreachable"}
    assert [path.name for path in store.folder.iterdir()] == ["metrics.json"]


def test_broken_metrics_read_as_a_broken_run(store):
    store.write_metrics({})
    store.metrics_path.write_text('{"status": "fin')
    assert store.metrics()["status"] == "broken"


def test_a_resumed_run_keeps_the_environment_of_its_first_samples(store):
    store.write_environment({"commit": "a"})
    append(store, "a")
    store.write_environment({"commit": "b"})
    env = json.loads((store.folder / "env.json").read_text())
    first, latest = environment_id({"commit": "a"}), environment_id({"commit": "b"})
    assert env == {"commit": "b", "earlier": {first: {"commit": "a"}}}
    assert list(store.environments()) == [latest, first]
    store.write_environment({"commit": "a"})  # and back
    assert list(store.environments()) == [first, latest]


def test_environments_of_older_files_are_read(store):
    append(store, "a")
    old = {"commit": "b", "resumed_from": {"commit": "a"}}
    (store.folder / "env.json").write_text(json.dumps(old))
    names = [environment_id({"commit": name}) for name in "bac"]
    assert list(store.environments()) == names[:2]
    store.write_environment({"commit": "c"})
    assert list(store.environments()) == [names[2], *names[:2]]


def test_metrics_that_do_not_belong_to_the_samples_read_as_broken(store):
    append(store, "a")
    store.write_metrics({"status": "failed", "samples_digest": store.samples_digest()})
    assert store.metrics()["status"] == "failed"
    append(store, "b")
    broken = store.metrics()
    assert (broken["status"], broken["error"]["type"]) == ("broken", "SamplesChanged")
    assert "resume=false, which measures everything again" in broken["error"]["message"]
    store.samples_path.unlink()
    assert store.metrics()["status"] == "broken"


def hold(store, started, seconds):
    with store.lock():
        started.set()
        time.sleep(seconds)


def test_a_second_process_waits_and_a_killed_one_does_not_block(store, caplog):
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=hold, args=(store, started, 60))
    process.start()
    started.wait()
    watcher = context.Process(target=hold, args=(store, context.Event(), 0))
    watcher.start()
    watcher.join(timeout=0.5)
    assert watcher.is_alive(), "the lock did not hold"
    process.kill()
    watcher.join(timeout=10)
    assert watcher.exitcode == 0
    with store.lock():
        pass


def test_a_run_that_continues_in_the_same_environment_leaves_its_file(store):
    store.write_environment({"commit": "a", "time": 1})
    append(store, "a")
    store.write_environment({"commit": "a", "time": 2})
    assert json.loads((store.folder / "env.json").read_text()) == {"commit": "a", "time": 1}


def test_what_a_killed_process_had_not_finished_writing_is_removed(store):
    store.write_metrics({"status": "failed"})
    scratch = store.folder / ".metrics.json.4711"
    scratch.write_text('{"status": "fin')
    remove_scratch(store.folder, older_than=60)
    assert scratch.exists(), "another process may be writing it"
    with store.lock():
        assert {path.name for path in store.folder.iterdir()} == {"metrics.json", ".lock"}


def test_a_run_is_open_until_it_is_closed(store):
    with store.lock():
        store.open()
    assert RunStore(store.folder).is_open
    store.close()
    store.close()
    assert not store.is_open

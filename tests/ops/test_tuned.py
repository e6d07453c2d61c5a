import json

import pytest
import torch

from experiments.timing.stopwatch import Effort
from experiments.tools import tune
from pbs.ops.block_sparse_attention import tuned
from pbs.ops.block_sparse_attention.triton import launch_options

SHAPE = {
    "head_dim": 128,
    "element_size": 2,
    "query_tile": 128,
    "key_tile": 128,
    "capability": (9, 0),
}


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    """A table on a machine that says it has a GPU; writes entries for SHAPE."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU")
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "table.json"))
    tuned.read_table.cache_clear()

    def write(options):
        table = {tuned.key_of("triton", SHAPE): options}
        (tmp_path / "table.json").write_text(json.dumps(table))

    yield write
    tuned.read_table.cache_clear()


def test_measured_options_replace_the_packaged_ones(on_a_gpu):
    default = launch_options(**SHAPE)
    measured = default._replace(num_stages=5)
    on_a_gpu(measured._asdict())
    assert tuned.tuned("triton", SHAPE, default) == measured
    assert tuned.tuned("triton", {**SHAPE, "head_dim": 64}, default) == default
    assert tuned.tuned("hopper", SHAPE, default) == default


def test_without_a_table_or_a_gpu_the_packaged_options_hold(on_a_gpu, monkeypatch):
    default = launch_options(**SHAPE)
    assert tuned.tuned("triton", SHAPE, default) is default
    on_a_gpu({"num_stages": 5})
    tuned.read_table.cache_clear()
    with pytest.raises(ValueError, match="launch options of another version"):
        tuned.tuned("triton", SHAPE, default)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tuned.tuned("triton", SHAPE, default) is default


def test_the_fastest_correct_candidate_wins(monkeypatch):
    options = list(tune.candidates(launch_options(**SHAPE)))
    assert len(options) == len(set(options)) >= 4
    slow, wrong, broken, quick = options[:4]

    def attend(option):
        if option is broken:
            raise RuntimeError("out of resource: shared memory")
        work = 4_000_000 if option is slow else 10
        torch.ones(work).cumsum(0)
        return torch.full((4,), 5.0 if option is wrong else 1.0)

    effort = Effort(seconds=0.05, min_rounds=3, max_rounds=3)
    assert tune.fastest(options[:4], attend, effort) is quick


def test_tuning_without_a_gpu_is_refused(capsys):
    with pytest.raises(SystemExit):
        tune.main([])
    assert "no CUDA device" in capsys.readouterr().err

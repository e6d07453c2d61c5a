import math

import pytest
import torch

from pbs import build_method
from pbs.methods import METHODS
from pbs.testing import make_qkv


@pytest.mark.parametrize(
    ("name", "params", "error", "message"),
    [
        ("pbss", {}, ValueError, r"unknown method 'pbss'. Did you mean 'pbs'\? Valid: .*flash"),
        ("pbs", {"treshold": 1}, ValueError, "Did you mean 'threshold'"),
        ("pbs", {"recorder": print}, ValueError, "parameter of method 'pbs'"),
        ("flash", {"threshold": 0.5}, ValueError, "unknown parameter of method 'flash'"),
        ("pbs", {"block_size": 100}, ValueError, "power of two of at least 16, got 100"),
        ("pbs", {"block_size": 8}, ValueError, "power of two"),
        ("pbs", {"block_size": 0}, ValueError, "power of two"),
        ("pbs", {"block_size": 128.0}, TypeError, "must be an integer"),
        ("pbs", {"block_size": True}, TypeError, "must be an integer"),
        ("pbs", {"segment_size": 300}, ValueError, "multiple of block_size, got 300 and 128; try"),
        ("pbs", {"segment_size": 0}, ValueError, "multiple of block_size"),
        ("pbs", {"threshold": 0.0}, ValueError, r"\(0, 1\], got 0.0"),
        ("pbs", {"threshold": 1.5}, ValueError, r"\(0, 1\]"),
        ("pbs", {"threshold": -0.1}, ValueError, r"\(0, 1\]"),
        ("pbs", {"threshold": math.nan}, ValueError, r"\(0, 1\], got nan"),
        ("pbs", {"threshold": "0.9"}, TypeError, "must be a number"),
        ("pbs", {"order": "last"}, ValueError, "unknown order 'last'. Did you mean 'last_block'"),
        ("pbs", {"selector": "mean"}, ValueError, "unknown selector 'mean'.*'meanpool'"),
        ("pbs", {"gqa": "share"}, ValueError, "unknown gqa 'share'. Did you mean 'shared'"),
        ("pbs", {"pad_mean": "zero"}, ValueError, "unknown pad_mean"),
        ("pbs", {"backend": "cuda"}, ValueError, "unknown backend 'cuda'"),
        ("meanpool", {"threshold": math.nan}, ValueError, r"\(0, 1\]"),
        ("meanpool", {"block_size": 96}, ValueError, "power of two"),
    ],
)
def test_wrong_names_and_values_are_refused(name, params, error, message):
    with pytest.raises(error, match=message):
        build_method(name, **params)


@pytest.mark.parametrize("name", METHODS.names)
def test_every_method_builds_with_its_defaults_and_runs(name):
    q, k, v = make_qkv(1, 4, 2, 300, 64)
    out = build_method(name)(q, k, v)
    assert out.isfinite().all()
    assert out.shape == q.shape


@pytest.mark.parametrize("name", METHODS.names)
def test_tensors_that_do_not_fit_are_refused(name):
    q, k, v = make_qkv(1, 4, 2, 100, 64)
    method = build_method(name)
    with pytest.raises(ValueError, match="one head dim"):
        method(q, k[..., :32], v[..., :32])
    with pytest.raises(TypeError, match="one dtype"):
        method(q, k.bfloat16(), v.bfloat16())
    with pytest.raises(ValueError, match="one device"):
        method(q, k.to("meta"), v.to("meta"))
    with pytest.raises(ValueError, match="one head dim"):
        method.plan(q, k[..., :32])


def test_equal_thresholds_mean_the_same_in_every_type():
    q, k, _ = make_qkv(1, 4, 2, 1000, 64)
    masks = [build_method("pbs", threshold=value).plan(q, k).block_mask() for value in (1, 1.0)]
    assert torch.equal(*masks)

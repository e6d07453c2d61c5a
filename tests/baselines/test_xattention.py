from dataclasses import replace

import pytest
import torch

from pbs import build_method
from pbs.testing import make_qkv


def test_threshold_per_head_and_layer():
    q, k, v = make_qkv(1, 4, 2, 300, 32, structure="mixed")
    per_head = [0.2, 0.5, 0.9, 1.0]
    plan = build_method("xattention", block_size=32, threshold=per_head).plan(q, k)
    for head, threshold in enumerate(per_head):
        alone = build_method("xattention", block_size=32, threshold=threshold).plan(q, k)
        assert torch.equal(plan.block_mask()[:, head], alone.block_mask()[:, head])
    layered = build_method("xattention", block_size=32, threshold=[[0.1] * 4, per_head])
    assert torch.equal(layered.plan(q, k, layer_idx=1).block_mask(), plan.block_mask())
    for layer_idx in (None, 2):
        with pytest.raises(ValueError, match="one row per layer"):
            layered(q, k, v, layer_idx=layer_idx)
    with pytest.raises(ValueError, match=r"one threshold per query head \(4\), got 3"):
        build_method("xattention", threshold=[0.5] * 3).plan(q, k)
    assert (layered.densest().plan(q, k).density() == 1).all()


def test_threshold_zero_keeps_sink_and_diagonal():
    q, k, _ = make_qkv(1, 2, 2, 320, 32)
    mask = build_method("xattention", block_size=32, threshold=0.0).plan(q, k).block_mask()
    expected = torch.eye(10, dtype=torch.bool)
    expected[:, 0] = True
    assert torch.equal(mask, expected.expand_as(mask))


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"stride": 7}, ValueError, "stride must divide block_size, got 7 and 128"),
        ({"stride": 0}, ValueError, "at least 1"),
        ({"stride": 8.0}, TypeError, "stride must be an integer"),
        ({"threshold": 1.1}, ValueError, r"\[0, 1\]"),
        ({"threshold": float("nan")}, ValueError, r"\[0, 1\]"),
        ({"threshold": [[0.5], [0.5, 0.5]]}, TypeError, "equal length"),
        ({"threshold": []}, ValueError, "got shape"),
        ({"threshold": "high"}, TypeError, "must be a number"),
        ({"first_chunk": "first"}, ValueError, "unknown first_chunk"),
    ],
)
def test_wrong_settings_are_refused(params, error, message):
    with pytest.raises(error, match=message):
        build_method("xattention", **params)
    if "stride" in params:
        with pytest.raises(error):
            build_method("pbs_plus", **params)


def test_selector_refuses_a_stride_that_does_not_divide_the_block():
    q, k, _ = make_qkv(1, 2, 2, 300, 32)
    method = build_method(
        "pbs", block_size=16, selector="antidiagonal", selector_params={"stride": 32}
    )
    with pytest.raises(ValueError, match="stride must divide the block size, got stride 32"):
        method.plan(q, k)


def test_pbs_plus_is_pbs_with_the_antidiagonal_selector():
    q, k, _ = make_qkv(1, 4, 2, 600, 32, structure="mixed")
    plus = build_method("pbs_plus", block_size=32, segment_size=64)
    same = build_method("pbs", block_size=32, segment_size=64, selector="antidiagonal")
    assert torch.equal(plus.plan(q, k).block_mask(), same.plan(q, k).block_mask())
    with pytest.raises(ValueError, match="use method=pbs"):
        build_method("pbs_plus", selector="meanpool")
    with pytest.raises(ValueError, match=r"got selector_params=.*set stride and normaliser"):
        build_method("pbs_plus", selector_params={"stride": 16})
    coarse = build_method("pbs_plus", block_size=32, segment_size=64, stride=16)
    assert not torch.equal(plus.plan(q, k).block_mask(), coarse.plan(q, k).block_mask())


def test_pbs_plus_can_be_copied_with_other_settings():
    method = build_method("pbs_plus", block_size=32, segment_size=64, normaliser="causal")
    copied = replace(method, stride=16, threshold=0.5)
    assert copied == build_method(
        "pbs_plus",
        block_size=32,
        segment_size=64,
        normaliser="causal",
        stride=16,
        threshold=0.5,
    )
    q, k, _ = make_qkv(1, 4, 2, 600, 32, structure="mixed")
    expected = build_method(
        "pbs",
        block_size=32,
        segment_size=64,
        threshold=0.5,
        selector="antidiagonal",
        selector_params={"stride": 16, "normaliser": "causal"},
    )
    assert torch.equal(copied.plan(q, k).block_mask(), expected.plan(q, k).block_mask())
    assert method.selector_params == copied.selector_params == {}

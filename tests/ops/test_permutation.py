import pytest
import torch

from pbs.ops.permutation import (
    gather_and_pool,
    gather_keys,
    importance_order,
    key_importance,
    reference,
    sort_segments,
    triton,
)
from pbs.ops.pooling import mean_pool
from pbs.testing import make_qkv

BACKENDS = ["reference", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("num_proxy", "num_keys", "head_dim"), [(1, 300, 16), (100, 300, 80), (16, 129, 64)]
)
def test_importance_is_the_mean_probability(
    num_proxy, num_keys, head_dim, dtype, backend, monkeypatch
):
    monkeypatch.setattr(reference, "MAX_SCORES", 1000)
    monkeypatch.setattr(triton, "MAX_CHUNKS", 2)
    q, k, _ = make_qkv(2, 4, 2, num_keys, head_dim, num_queries=num_proxy, dtype=dtype)
    scores = key_importance(q, k, scale=0.2, backend=backend)
    logits = q.double() @ k.repeat_interleave(2, 1).double().transpose(-1, -2) * 0.2
    expected = logits.softmax(-1).mean(2).float()
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_proxies_with_more_bits_than_the_keys_keep_them(backend):
    q, k, _ = make_qkv(1, 4, 2, 300, 64, num_queries=40, dtype=torch.float16)
    # A common mean: rounding the means to 16 bits would move the logits by several percent.
    q, k = q + 20, k + 20
    proxy = q.unflatten(2, (-1, 4)).mean(dim=3, dtype=torch.float32)
    scores = key_importance(proxy, k, scale=0.2, backend=backend)
    logits = proxy.double() @ k.repeat_interleave(2, 1).double().transpose(-1, -2) * 0.2
    expected = logits.softmax(-1).mean(2).float()
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-6)
    rounded = key_importance(proxy.half(), k, scale=0.2, backend=backend)
    assert ((rounded - expected).abs() > 0.01 * expected).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("segment_size", [16, 48])
def test_segments_are_sorted_with_ties_in_natural_order(segment_size, backend):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 3, 96, generator=generator)
    scores[0, 0] = 0.5
    scores[1, 2, ::2] = 0.0
    order = sort_segments(scores, num_keys=101, segment_size=segment_size, backend=backend)
    assert order.dtype == torch.int64
    for start in range(0, 96, segment_size):
        part = scores[..., start : start + segment_size]
        expected = part.argsort(dim=-1, descending=True, stable=True) + start
        assert torch.equal(order[..., start : start + segment_size], expected)
    assert torch.equal(order[..., 96:], torch.arange(96, 101).expand(2, 3, -1))
    assert torch.equal(order[0, 0], torch.arange(101))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order_heads", [2, 4])
def test_gather_moves_rows_of_each_head(order_heads, backend):
    _, k, _ = make_qkv(2, 4, 2, 70, 24)
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(2, order_heads, 70, generator=generator).argsort(-1)
    strided = k.transpose(1, 2).contiguous().transpose(1, 2)
    out = gather_keys(strided, order, backend=backend)
    repeated = k.repeat_interleave(order_heads // 2, 1)
    expected = torch.stack(
        [torch.stack([repeated[z, h, order[z, h]] for h in range(order_heads)]) for z in range(2)]
    )
    assert out.is_contiguous()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("num_keys", "segment_size"), [(256, 16), (300, 48), (512, 512)])
def test_segments_scored_and_sorted_at_once_descend_by_importance(num_keys, segment_size, dtype):
    q, k, _ = make_qkv(1, 2, 1, num_keys, 16, num_queries=20, dtype=dtype, structure="vertical")
    order = importance_order(q, k, scale=0.3, segment_size=segment_size, backend="triton")
    num_sorted = num_keys // segment_size * segment_size
    scores = key_importance(q, k[:, :, :num_sorted], scale=0.3, backend="reference")
    segments = order[..., :num_sorted].unflatten(-1, (-1, segment_size))
    assert torch.equal(
        segments.sort(-1).values.flatten(2), torch.arange(num_sorted).expand(1, 2, -1)
    )
    starts = torch.arange(0, num_sorted, segment_size)[:, None]
    assert ((segments >= starts) & (segments < starts + segment_size)).all()
    ranked = scores.gather(-1, order[..., :num_sorted]).unflatten(-1, (-1, segment_size))
    # Scores rounded otherwise may swap keys that are as good as equal.
    assert (ranked.diff(dim=-1) <= 1e-3 * ranked[..., :-1] + 1e-9).all()
    assert torch.equal(order[..., num_sorted:], torch.arange(num_sorted, num_keys).expand(1, 2, -1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_complete_segment_is_refused(backend):
    q, k, _ = make_qkv(1, 2, 1, 40, 16, num_queries=4)
    with pytest.raises(ValueError, match="at least one complete segment of 64 keys, got 40"):
        importance_order(q, k, scale=0.3, segment_size=64, backend=backend)


@pytest.mark.parametrize("pad_mean", ["real", "reference"])
@pytest.mark.parametrize("tile", [16, 128])
def test_means_come_with_the_gathered_keys(tile, pad_mean):
    _, k, _ = make_qkv(2, 4, 2, 300, 24)
    order = torch.rand(2, 4, 300, generator=torch.Generator().manual_seed(0)).argsort(-1)
    gathered, means = gather_and_pool(k, order, tile=tile, pad_mean=pad_mean, backend="triton")
    assert torch.equal(gathered, gather_keys(k, order, backend="reference"))
    expected = mean_pool(gathered, tile, pad_mean=pad_mean, backend="reference")
    torch.testing.assert_close(means, expected)


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        sort_segments(torch.ones(1, 1, 4), num_keys=4, segment_size=4, backend="cuda")

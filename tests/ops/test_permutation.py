import pytest
import torch

from pbs.ops.permutation import gather_keys, key_importance, reference, sort_segments, triton
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
    monkeypatch.setattr(triton, "CHUNK", 256)
    q, k, _ = make_qkv(2, 4, 2, num_keys, head_dim, num_queries=num_proxy, dtype=dtype)
    scores = key_importance(q, k, scale=0.2, backend=backend)
    logits = q.double() @ k.repeat_interleave(2, 1).double().transpose(-1, -2) * 0.2
    expected = logits.softmax(-1).mean(2).float()
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-6)


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


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        sort_segments(torch.ones(1, 1, 4), num_keys=4, segment_size=4, backend="cuda")

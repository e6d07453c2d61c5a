import pytest
import torch

from pbs.ops.pooling import mean_pool
from pbs.testing import make_qkv


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("pad_mean", ["real", "reference"])
@pytest.mark.parametrize(("num_tokens", "tile"), [(256, 64), (300, 128), (7, 16)])
def test_kernel_matches_the_reference(num_tokens, tile, pad_mean, dtype):
    q, _, _ = make_qkv(2, 4, 2, num_tokens, 24, dtype=dtype)
    strided = q.transpose(1, 2).contiguous().transpose(1, 2)
    means = mean_pool(strided, tile, pad_mean=pad_mean, backend="triton")
    expected = mean_pool(q, tile, pad_mean=pad_mean, backend="reference")
    assert means.dtype == torch.float32
    torch.testing.assert_close(means, expected)


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        mean_pool(torch.ones(1, 1, 1, 1), 16, backend="gpu")

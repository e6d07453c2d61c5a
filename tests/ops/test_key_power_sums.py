"""What rows want of each key: against fp64, in both backends."""

import pytest
import torch

from pbs.ops.key_power_sums import key_power_sums
from pbs.testing import make_qkv


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    ("kv_heads", "power", "head_dim"), [(1, 1.0, 32), (2, 4.0, 48), (4, 16.0, 16)]
)
def test_every_key_holds_the_logarithm_of_its_sum(backend, power, head_dim, kv_heads):
    q, k, _ = make_qkv(2, 4, kv_heads, 300, head_dim, structure="mixed")
    rows, ends = q[:, :, 3:93], torch.arange(90) // 7 * 20  # the first see nothing
    keys = k.repeat_interleave(4 // kv_heads, dim=1).double()
    logits = rows.double() @ keys.transpose(-1, -2) * 0.3
    hidden = torch.arange(300) >= ends[:, None]
    weights = (
        logits.masked_fill(hidden, float("-inf")).log_softmax(dim=-1).nan_to_num(float("-inf"))
    )
    expected = (power * weights.masked_fill(hidden, float("-inf"))).logsumexp(dim=2)
    got = key_power_sums(rows, k, ends, scale=0.3, power=power, backend=backend)
    assert got.dtype == torch.float32
    assert torch.equal(got.isinf(), expected.isinf())
    seen = ~expected.isinf()
    torch.testing.assert_close(got[seen].double(), expected[seen], atol=2e-4 * power, rtol=1e-5)


def test_ends_of_another_shape_are_refused():
    q, k, _ = make_qkv(1, 2, 1, 64, 16)
    with pytest.raises(ValueError, match=r"expected ends \[64\], got \[3\]"):
        key_power_sums(q, k, torch.zeros(3, dtype=torch.int32), scale=1.0, power=4.0)

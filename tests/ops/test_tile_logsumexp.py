"""Log-sums of tiles of keys: against fp64, in both backends."""

import pytest
import torch

from pbs.ops.tile_logsumexp import tile_logsumexp
from pbs.testing import make_qkv


def truth(rows, keys, begins, ends, tile, scale):
    keys = keys.repeat_interleave(rows.shape[1] // keys.shape[1], dim=1).double()
    logits = rows.double() @ keys.transpose(-1, -2) * scale
    places = torch.arange(keys.shape[2])
    hidden = (places < begins[..., None]) | (places >= ends[..., None])
    logits = logits.masked_fill(hidden, float("-inf"))
    missing = -keys.shape[2] % tile
    logits = torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))
    return logits.unflatten(-1, (-1, tile)).logsumexp(dim=-1)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("tile", "head_dim", "kv_heads"), [(32, 32, 1), (8, 48, 2), (128, 16, 4)])
@pytest.mark.parametrize("has_natural", [False, True])
def test_every_tile_holds_the_logarithm_of_its_sum(backend, tile, head_dim, kv_heads, has_natural):
    q, k, _ = make_qkv(2, 4, kv_heads, 300, head_dim, structure="mixed")
    generator = torch.Generator().manual_seed(0)
    ends = torch.randint(0, 301, (4, 170), generator=generator)  # some see nothing
    ends[:, 150:] = 300
    rows, others = q[:, :, 3:173], {}
    expected = truth(rows, k, ends * 0, ends, tile, 0.3)
    if has_natural:
        until, ends = ends, ends * torch.rand(4, 170, generator=generator) // tile * tile
        natural = k.flip(2)
        others = {"natural": natural[:, :1] if kv_heads == 2 else natural, "until": until}
        expected = torch.maximum(
            truth(rows, k, ends * 0, ends, tile, 0.3),
            truth(rows, others["natural"], ends, until, tile, 0.3),
        )
    got = tile_logsumexp(rows, k, ends, tile=tile, scale=0.3, backend=backend, **others)
    assert got.dtype == torch.float32
    assert torch.equal(got.isinf(), expected.isinf())
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-5)


def test_bounds_of_another_shape_are_refused():
    q, k, _ = make_qkv(1, 2, 1, 64, 16)
    bounds = torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"expected ends \[2, 64\], got \[2, 3\]"):
        tile_logsumexp(q, k, bounds, tile=16, scale=1.0)
    with pytest.raises(ValueError, match="natural and until belong together"):
        tile_logsumexp(q, k, bounds, natural=k, tile=16, scale=1.0)

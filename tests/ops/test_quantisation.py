"""Eight-bit copies: errors of the format, layouts of the matrix unit, Triton as the reference."""

import pytest
import torch

from pbs.ops.permutation import gather_keys
from pbs.ops.quantisation import (
    LARGEST,
    channel_scales,
    interleave,
    quantise_rows,
    quantise_values,
    reference,
    rotation,
    rotation_size,
)
from pbs.ops.quantisation import triton as kernels
from pbs.testing import make_qkv

SIZES = [(256, 64, 24), (300, 128, 64), (7, 16, 16), (130, 128, 80)]


def given(num_tokens, head_dim, *, moved, dtype=torch.float32):
    """Keys of two sequences with two heads, and an order of four."""
    _, k, _ = make_qkv(2, 4, 2, num_tokens, head_dim, dtype=dtype)
    order = torch.stack([torch.randperm(num_tokens) for _ in range(8)]).view(2, 4, -1)
    return k, order if moved else None


def placed(x, order):
    return x.float() if order is None else gather_keys(x.float(), order)


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(("num_tokens", "tile", "head_dim"), SIZES)
def test_rows_err_by_half_a_step(num_tokens, tile, head_dim, moved):
    k, order = given(num_tokens, head_dim, moved=moved)
    shift = k.mean(dim=2)
    eight, scales = quantise_rows(k, tile=tile, order=order, shift=shift, backend="reference")
    assert eight.dtype == torch.float8_e4m3fn
    scale = scales.repeat_interleave(tile, dim=2)[:, :, :num_tokens, None]
    exact = placed(k - shift.unsqueeze(2), order)
    assert eight.shape == exact.shape
    error = (eight.float() * scale - exact).abs()
    # Three bits of mantissa; below 2^-6 steps are 2^-9.
    assert bool((error <= torch.maximum(exact.abs() / 16, scale * 2**-10) * 1.0001).all())
    assert float(eight.float().abs().max()) == LARGEST


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(("num_tokens", "tile", "head_dim"), SIZES)
def test_values_lie_channel_by_channel_and_interleaved(num_tokens, tile, head_dim, moved):
    v, order = given(num_tokens, head_dim, moved=moved)
    scales = channel_scales(v)
    eight = quantise_values(v, scales, tile=tile, order=order, backend="reference")
    num_places = -(-num_tokens // tile) * tile
    assert eight.shape == (2, 4 if moved else 2, head_dim, num_places)
    restored = torch.empty_like(eight, dtype=torch.float32)
    restored[..., interleave(num_places)] = eight.float()
    groups = eight.shape[1] // 2
    restored = restored.transpose(2, 3) * scales.repeat_interleave(groups, dim=1).unsqueeze(2)
    exact = placed(v, order)
    assert bool((restored[:, :, num_tokens:] == 0).all())
    error = (restored[:, :, :num_tokens] - exact).abs()
    smallest = scales.repeat_interleave(groups, dim=1).unsqueeze(2) * 2**-10
    assert bool((error <= torch.maximum(exact.abs() / 16, smallest) * 1.0001).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(("num_tokens", "tile", "head_dim"), SIZES)
def test_kernels_match_the_reference(num_tokens, tile, head_dim, moved, dtype):
    """Up to the conversion, which Triton's interpreter does wrongly (tests/ops/test_gpu.py)."""
    k, order = given(num_tokens, head_dim, moved=moved, dtype=dtype)
    strided = k.transpose(1, 2).contiguous().transpose(1, 2)
    scales = channel_scales(k)
    settings = {"tile": tile, "order": order}
    found = kernels.quantise_values(strided, scales, **settings, dtype=torch.float32)
    expected = reference.quantise_values(k, scales, **settings)
    assert torch.equal(found.to(torch.float8_e4m3fn).float(), expected.float())
    for name, more in (
        ("quantise_rows", {"shift": k.float().mean(dim=2), "rotated": False}),
        ("quantise_rows", {"shift": None, "rotated": False}),
    ):
        settings = {"tile": tile, "order": order, **more}
        found, scales = getattr(kernels, name)(strided, **settings, dtype=torch.float32)
        expected, expected_scales = getattr(reference, name)(k, **settings)
        assert torch.equal(scales, expected_scales)
        assert torch.equal(found.to(torch.float8_e4m3fn).float(), expected.float())


@pytest.mark.parametrize("head_dim", [16, 24, 64, 80])
def test_rotated_rows_have_the_same_products(head_dim):
    turn, size = rotation(head_dim, torch.device("cpu")), rotation_size(head_dim)
    assert torch.equal(turn @ turn, size * torch.eye(head_dim))
    k, order = given(300, head_dim, moved=True)
    shift = k.mean(dim=2)
    settings = {"tile": 128, "order": order, "shift": shift, "rotated": True}
    eight, scales = reference.quantise_rows(k, **settings)
    found, found_scales = kernels.quantise_rows(k, **settings, dtype=torch.float32)
    torch.testing.assert_close(found_scales, scales)
    # Sums in another order: a quotient may round to the next step.
    torch.testing.assert_close(found, eight.float(), rtol=0.13, atol=0.002)
    rows = eight.float() * scales.repeat_interleave(128, dim=2)[:, :, :300, None]
    exact = placed(k - shift.unsqueeze(2), order)
    error = (rows @ turn * size**-0.5 - exact).square().mean().sqrt()
    assert float(error) < 0.04 * float(exact.square().mean().sqrt())


def test_threads_hold_weights_where_values_are():
    """Logits of keys 8g + 2t + j lie with thread t; a fp8 factor's places 4t .. 4t + 3 do, too."""
    places = interleave(32)
    assert sorted(places.tolist()) == list(range(32))
    for place, key in enumerate(places.tolist()):
        assert key % 8 // 2 == place % 16 // 4


def test_zeros_stay_zeros_and_nan_stays_nan():
    x = torch.zeros(1, 1, 32, 16)
    eight, scales = quantise_rows(x, tile=16, backend="reference")
    assert bool((eight.float() == 0).all())
    assert bool((scales == 1).all())
    x[0, 0, 3, 2] = float("nan")
    assert bool(quantise_rows(x, tile=16, backend="reference")[0].float()[0, 0, 3, 2].isnan())
    assert bool(
        quantise_values(x, channel_scales(x), tile=16, backend="reference")
        .float()[0, 0, 2]
        .isnan()
        .any()
    )

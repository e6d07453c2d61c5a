import pytest
import torch

from pbs import build_method
from pbs.selectors.bands import band_dims, band_probabilities
from pbs.testing import make_qkv


def test_bands_of_both_layouts():
    assert band_dims(8, 4, band="high", layout="half") == [0, 1, 4, 5]
    assert band_dims(8, 6, band="low", layout="half") == [1, 2, 3, 5, 6, 7]
    assert band_dims(8, 4, band="low", layout="interleaved") == [4, 5, 6, 7]


@pytest.mark.parametrize("num_dims", [0, 3, 10])
def test_impossible_bands_are_refused(num_dims):
    with pytest.raises(ValueError, match=r"even number of dims in \[2, 8\]"):
        band_dims(8, num_dims, band="low", layout="half")


def test_band_probabilities_follow_the_formula():
    q, k, _ = make_qkv(1, 4, 2, 10, 8)
    dims = [1, 2, 5, 6]
    causal = torch.ones(10, 10, dtype=torch.bool).tril()
    ours = band_probabilities(q, k, dims=dims, scale=8**-0.5, candidates=causal)
    keys = k.repeat_interleave(2, 1)

    def rms(x):
        return x.pow(2).mean((2, 3), keepdim=True).sqrt()

    temperature = (4 / 8) ** 0.5 * rms(q[..., dims]) / rms(q) * rms(keys[..., dims]) / rms(keys)
    logits = q[..., dims] @ keys[..., dims].transpose(-1, -2) / (4**0.5 * temperature)
    expected = logits.masked_fill(~causal, float("-inf")).softmax(-1)
    torch.testing.assert_close(ours, expected)


def test_band_without_energy_is_uniform():
    q, k, _ = make_qkv(1, 2, 2, 6, 8)
    k[..., [2, 6]] = 0.0
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    ours = band_probabilities(q, k, dims=[2, 6], scale=0.3, candidates=causal)
    torch.testing.assert_close(ours[0, 0, 3, :4], torch.full((4,), 0.25))


def test_prism_is_the_union_of_its_bands():
    q, k, _ = make_qkv(1, 4, 2, 600, 32, structure="mixed")
    both = build_method("prism", block_size=32, threshold=0.5).plan(q, k).block_mask()
    one = build_method("prism", block_size=32, threshold=0.5, low_dims=16).plan(q, k).block_mask()
    assert not torch.equal(both, one)
    assert both[..., 0].all()


@pytest.mark.parametrize(
    ("params", "message"),
    [({"rope_layout": "neox"}, "unknown rope_layout"), ({"threshold": 0}, "threshold must lie")],
)
def test_wrong_settings_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        build_method("prism", **params)

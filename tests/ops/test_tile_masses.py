"""Masses of key tiles: against fp64, in both backends."""

import pytest
import torch

from pbs.ops.tile_masses import tile_masses

INF = float("inf")
COUNTS = torch.tensor([4, 4, 2, 1])
SMOOTH_COUNTS = torch.tensor([2, 3, 3, 1])
LIMITS = torch.tensor([0, 3, 17, 20])


def truth(sums, counts, smooth, power, share):
    """By loops over query tiles and rows."""
    out = torch.zeros(*sums.shape[:3], sums.shape[4], dtype=torch.float64)
    for tile in range(sums.shape[2]):
        limit = int(LIMITS[tile])
        p = sums[:, :, tile, : counts[tile]].double().softmax(-1)[..., :limit]
        joined = (p**power).mean(dim=2) ** (1 / power)
        total = p.sum(-1).mean(dim=2)[..., None]
        joined = joined / joined.sum(-1, keepdim=True) * total
        if smooth is not None and limit:
            rows = smooth[:, :, tile, : SMOOTH_COUNTS[tile], :limit].double()
            joined = (1 - share) * joined + share * total * rows.softmax(-1).mean(dim=2)
        out[:, :, tile, :limit] = joined
    return out


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("power", [1.0, 4.0])
@pytest.mark.parametrize("has_smooth", [False, True])
def test_rows_are_joined_by_a_power_mean_and_the_total_is_the_plain_means(
    backend, power, has_smooth
):
    generator = torch.Generator().manual_seed(0)
    sums = torch.randn(2, 3, 4, 4, 21, generator=generator) * 6
    sums[..., 2, :, 5] = -INF  # a tile that no row sees
    sums[:, :, 1, 0, 1:] = -INF
    smooth = None
    if has_smooth:
        smooth = torch.randn(2, 3, 4, 3, 21, generator=generator) * 3
        smooth = smooth.masked_fill(torch.arange(21) >= LIMITS[:, None, None], -INF)
    got = tile_masses(
        sums,
        COUNTS,
        LIMITS,
        power=power,
        smooth=smooth,
        smooth_counts=None if smooth is None else SMOOTH_COUNTS,
        share=0.3 if has_smooth else 0.0,
        backend=backend,
    )
    expected = truth(sums, COUNTS, smooth, power, 0.3)
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_small_masses_keep_their_powers(backend):
    sums = torch.tensor([0.0, -50.0, -51.0]).view(1, 1, 1, 1, 3)
    limits, counts = torch.tensor([3]), torch.tensor([1])
    got = tile_masses(sums[..., [1, 2, 0]], counts, limits - 1, power=4.0, backend=backend)
    expected = torch.tensor([-50.0, -51.0]).exp()
    torch.testing.assert_close(got[0, 0, 0, :2], expected, atol=0, rtol=1e-4)


def test_half_of_the_second_scores_is_refused():
    x, counts = torch.zeros(1, 1, 1, 1, 2), torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="belong together"):
        tile_masses(x, counts, counts, power=4.0, smooth=x)

"""The largest entries within a goal: against a cumulative sum in fp64, in both backends."""

import pytest
import torch

from pbs.ops.largest_within import largest_within


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("goal", [0.0, 0.3, 0.95, 2.0])
@pytest.mark.parametrize("sharpness", [0.1, 3.0, 30.0])
def test_the_most_of_the_largest_entries_that_stay_within_the_goal(backend, goal, sharpness):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 2, 5000, generator=generator) * sharpness).softmax(dim=-1)
    border = largest_within(x, goal, backend=backend)
    sums = x.double().sort(dim=-1, descending=True).values.cumsum(dim=-1)
    counts = border.counts(x)
    # Sums of fp32 differ by rounding.
    assert (counts <= (sums <= goal + 1e-6).sum(-1)).all()
    assert (counts >= (sums <= goal - 1e-6).sum(-1)).all()
    mask = border.mask(x)
    assert torch.equal(mask.sum(-1), counts)
    least = x.masked_fill(~mask, 2.0).amin(-1)
    assert (least >= x.masked_fill(mask, -1.0).amax(-1)).all()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_ties_go_to_the_lower_index_and_zeros_stay_within_any_goal(backend):
    x = torch.tensor([[0.25, 0.5, 0.25, 0.0], [0.2, 0.2, 0.2, 0.4], [0.0, 0.0, 0.0, 0.0]])
    border = largest_within(x, 0.75, backend=backend)
    expected = [[True, True, False, False], [True, False, False, True], [True] * 4]
    assert border.mask(x).tolist() == expected
    assert border.counts(x).tolist() == [2, 2, 4]
    assert largest_within(x, 2.0, backend=backend).mask(x).all()
    assert largest_within(x, 0.1, backend=backend).counts(x).tolist() == [0, 0, 4]


def test_another_dtype_is_refused():
    with pytest.raises(TypeError, match="fp32"):
        largest_within(torch.zeros(3, 4, dtype=torch.float64), 0.5)

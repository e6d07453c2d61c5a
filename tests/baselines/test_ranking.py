"""A border found without a sort is the sorts."""

import pytest
import torch

from baselines.ranking import count_within, find_border, mask_within


@pytest.mark.parametrize("goal", [0.0, 0.3, 0.95, 2.0])
@pytest.mark.parametrize("sharpness", [0.1, 3.0, 30.0])
def test_the_search_finds_what_a_sort_does(goal, sharpness):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 3, 1000, generator=generator) * sharpness).softmax(dim=-1)
    border = find_border(x, goal)
    ranked = x.double().sort(dim=-1, descending=True).values.cumsum(dim=-1)
    counts = border.counts(x)
    # Sums differ by rounding: the border may fall one of the smallest entries apart.
    assert ((counts - (ranked <= goal + 1e-6).sum(-1)) <= 0).all()
    assert ((counts - (ranked <= goal - 1e-6).sum(-1)) >= 0).all()
    assert torch.equal(border.mask(x).sum(-1), counts)


def test_ties_go_to_the_lower_index_and_zeros_fit_any_goal():
    x = torch.tensor([[0.25, 0.5, 0.25, 0.0], [0.2, 0.2, 0.2, 0.4], [0.0, 0.0, 0.0, 0.0]])
    expected = [[True, True, False, False], [True, False, False, True], [True] * 4]
    assert find_border(x, 0.75).mask(x).tolist() == expected
    assert mask_within(x, 0.75).tolist() == expected
    assert find_border(x, 0.75).counts(x).tolist() == count_within(x, 0.75).tolist() == [2, 2, 4]
    assert find_border(x, 2.0).mask(x).all()

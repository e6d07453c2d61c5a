import torch

from pbs.ops.block_selection import select_top_p
from pbs.ops.grid import BlockGrid
from pbs.ops.pooling import mean_pool
from pbs.selectors.meanpool import MeanPoolSelector
from pbs.testing import make_qkv

ALL = torch.ones(1, 4, dtype=torch.bool)


def select(row, threshold):
    probabilities = torch.tensor(row)[None, None, None]
    return select_top_p(probabilities, threshold=threshold, candidates=ALL)[0, 0, 0].tolist()


def test_fewest_blocks_that_reach_the_threshold():
    row = [0.1, 0.5, 0.15, 0.25]
    assert select(row, 0.5) == [False, True, False, False]
    assert select(row, 0.51) == [False, True, False, True]
    assert select(row, 0.9) == [False, True, True, True]
    assert select(row, 1.0) == [True, True, True, True]


def test_ties_go_to_the_lower_index():
    assert select([0.25, 0.25, 0.25, 0.25], 0.5) == [True, True, False, False]


def test_row_that_rounds_below_the_threshold_keeps_all_its_blocks():
    # The original selects nothing where no rounded sum reaches the threshold.
    assert select([0.3, 0.3, 0.2, 0.19], 0.9999) == [True, True, True, True]


def test_row_without_candidates_selects_nothing():
    none = torch.zeros(1, 4, dtype=torch.bool)
    for threshold in (0.5, 1.0):
        assert not select_top_p(torch.zeros(1, 1, 1, 4), threshold=threshold, candidates=none).any()


def test_partial_last_block_is_a_mean_over_real_tokens():
    x = torch.arange(10.0)[None, None, :, None]
    assert mean_pool(x, 4).flatten().tolist() == [1.5, 5.5, 8.5]
    assert mean_pool(x, 4, pad_mean="reference").flatten().tolist() == [1.5, 5.5, 4.25]
    assert mean_pool(x, 16).flatten().tolist() == [4.5]


def test_meanpool_probabilities_are_a_softmax_over_the_candidates():
    q, k, _ = make_qkv(2, 4, 2, 100, 16)
    grid = BlockGrid(100, 100, 32, 32)
    candidates = grid.past_tiles()
    probabilities = MeanPoolSelector().block_probabilities(
        q, k, scale=0.25, grid=grid, candidates=candidates
    )
    logits = mean_pool(q, 32) @ mean_pool(k, 32).repeat_interleave(2, 1).transpose(-1, -2) * 0.25
    expected = logits.masked_fill(~candidates, float("-inf")).softmax(-1).nan_to_num(0.0)
    torch.testing.assert_close(probabilities, expected)
    assert not probabilities[:, :, 0].any()

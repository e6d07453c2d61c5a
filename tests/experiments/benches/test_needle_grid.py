"""Which samples a limit, sampled coverage and held-out prompts take: every part has its share."""

from collections import Counter
from itertools import product

import pytest

from experiments.benches.needle import NeedleBench
from experiments.benches.needle_grid import grid, pair, share, spread

TASKS = ("a", "b", "c", "d", "e")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@pytest.mark.parametrize("num_samples", [1, 2])
@pytest.mark.parametrize("depths", [DEPTHS, DEPTHS[:4], DEPTHS[:1]], ids=len)
@pytest.mark.parametrize("lengths", [(1024,), (1024, 4096, 8192)], ids=len)
def test_the_grid_has_every_sample_once(lengths, depths, num_samples):
    cells = list(grid(TASKS, lengths, depths, num_samples))
    assert sorted(cells) == sorted(product(TASKS, lengths, depths, range(num_samples)))


@pytest.mark.parametrize("num_samples", [1, 5])
@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_a_share_has_the_depths_of_every_length_and_task_in_turn(every, num_samples):
    cells = share(list(grid(TASKS, (1, 2, 3, 4, 5), DEPTHS, num_samples)), every)
    each = -(-len(DEPTHS) * num_samples // every)
    assert set(Counter((task, length) for task, length, *_ in cells).values()) == {each}
    for position in (0, 1):  # task, length
        counts = Counter((cell[position], cell[2]) for cell in cells)
        assert len(counts) == 25
        assert set(counts.values()) == {each}


def test_a_share_of_the_default_grid_meets_all_depths_at_every_length():
    cells = share(NeedleBench().grid(), 5)
    assert len(cells) == 15
    for length in (1024, 4096, 8192):
        assert {cell[2] for cell in cells if cell[1] == length} == set(DEPTHS)
    assert len({(task, depth) for task, _, depth, _ in cells}) == 15


def test_no_share_is_empty_or_more_than_asked():
    cells = list(grid(TASKS, (1, 2), DEPTHS, 1))
    assert share(cells, 0) == frozenset()
    assert share(cells, 1) == frozenset(cells)
    assert len(share(cells, 1000)) == 10


@pytest.mark.parametrize("limit", [1, 3, 7])
def test_a_limit_keeps_no_depth_alone(limit):
    depths = Counter(depth for *_, depth, _ in NeedleBench(limit=limit).grid())
    assert len(depths) == 5
    assert max(depths.values()) - min(depths.values()) <= 1


@pytest.mark.parametrize("depths", [DEPTHS, DEPTHS[:4], (0.5,)], ids=len)
def test_held_out_prompts_take_all_pairs_before_any_again(depths):
    number = len(TASKS) * len(depths)
    assert len({pair(TASKS, depths, index) for index in range(number)}) == number
    assert pair(TASKS, depths, number) == pair(TASKS, depths, 0)


def test_the_first_depths_lie_evenly():
    assert spread(DEPTHS) == [0.5, 0.0, 0.75, 0.25, 1.0]
    assert sorted(spread([0.3, 0.1])) == [0.1, 0.3]
    assert spread([0.7]) == [0.7]

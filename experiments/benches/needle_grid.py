"""Which samples ``bench=needle`` has, in an order of which every beginning is a fair share.

Limits, sampled coverage and held-out prompts all take a first part: it must not be one depth, nor
pair the same task with the same depth again and again.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

# Task, length, depth, and index among the samples with these.
Cell = tuple[str, int, float, int]

GOLDEN_SECTION = (5**0.5 - 1) / 2


def grid(
    tasks: Sequence[str], lengths: Sequence[int], depths: Sequence[float], num_samples: int
) -> Iterator[Cell]:
    """Every sample, lengths mixed for a steady pace.

    A task and a length take every depth before any again, in the order of :func:`spread`, and each
    next task and length begin one depth further (a Latin square): the first samples of all of them
    have the depths in equal shares, as have those of one task, and those of one length.
    """
    order = spread(depths)
    for index in range(num_samples):
        for turn in range(len(order)):
            for row, length in enumerate(lengths):
                for column, task in enumerate(tasks):
                    yield task, length, order[(turn + row + column) % len(order)], index


def first(cells: Iterable[Cell], limit: int | None) -> list[Cell]:
    """At most ``limit`` samples of each task, the first; None for all."""
    taken: Counter[str] = Counter()
    kept = []
    for cell in cells:
        taken[cell[0]] += 1
        if limit is None or taken[cell[0]] <= limit:
            kept.append(cell)
    return kept


def share(cells: Sequence[Cell], every: int) -> frozenset[Cell]:
    """One of ``every`` samples, rounded up, of each task and length: the first of :func:`grid`.

    Args:
        cells: in the order of :func:`grid`.
        every: 1 for all, 0 for none.
    """
    if every == 0:
        return frozenset()
    groups: dict[tuple[str, int], list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell[:2]].append(cell)
    return frozenset(cell for group in groups.values() for cell in group[: -(-len(group) // every)])


def pair(tasks: Sequence[str], depths: Sequence[float], number: int) -> tuple[str, float]:
    """Task and depth of the ``number``-th prompt outside the grid: all pairs before any again.

    Tasks take turns, and so do depths, shifted by one whenever the tasks begin again.
    """
    turn, column = divmod(number, len(tasks))
    order = spread(depths)
    return tasks[column], order[(turn + column) % len(order)]


def spread(depths: Sequence[float]) -> list[float]:
    """The same depths so ordered that the first few, however many, lie evenly; the middle first."""
    places = [(0.5 + number * GOLDEN_SECTION) % 1 for number in range(len(depths))]
    ranks = {place: rank for rank, place in enumerate(sorted(places))}
    ascending = sorted(depths)
    return [ascending[ranks[place]] for place in places]

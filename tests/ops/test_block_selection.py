import pytest
import torch

from pbs import BlockGrid
from pbs.ops.block_selection import (
    list_blocks,
    select_pooled_blocks,
    select_top_p_blocks,
    triton,
)
from pbs.ops.block_selection.triton import MAX_KEY_TILES

BACKENDS = ["reference", "triton"]


def lists(
    probabilities, threshold, backend, *, candidates=None, limits=None, forced=None, covered=None
):
    """The selected blocks of every row, as Python lists."""
    num_rows, num_tiles = probabilities.shape[-2:]
    candidates = torch.full((num_rows,), num_tiles) if candidates is None else candidates
    blocks, counts = select_top_p_blocks(
        probabilities,
        threshold=threshold,
        candidates=candidates,
        limits=candidates if limits is None else limits,
        forced=forced,
        covered=covered,
        backend=backend,
    )
    assert blocks.dtype == (torch.int16 if backend == "triton" else torch.int32)
    assert counts.dtype == torch.int32
    rows = zip(blocks.flatten(0, 2), counts.flatten(), strict=True)
    return [row[:count].tolist() for row, count in rows]


def select(row, threshold, backend, covered=None, **bounds):
    if covered is not None:
        covered = torch.tensor([[[covered]]])
    return lists(
        torch.tensor(row)[None, None, None], threshold, backend, covered=covered, **bounds
    )[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_lists_have_the_true_places_in_ascending_order(backend):
    mask = torch.tensor([[True, False, True, True, False], [False] * 5])[None, None]
    blocks, counts = list_blocks(mask, backend=backend)
    assert blocks.dtype == (torch.int16 if backend == "triton" else torch.int32)
    assert counts.dtype == torch.int32
    assert counts.flatten().tolist() == [3, 0]
    assert blocks[0, 0, 0, :3].tolist() == [0, 2, 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_fewest_blocks_that_reach_the_threshold(backend):
    row = [0.1, 0.5, 0.15, 0.25]
    assert select(row, 0.5, backend) == [1]
    assert select(row, 0.51, backend) == [1, 3]
    assert select(row, 0.9, backend) == [1, 2, 3]
    assert select(row, 0.95, backend) == [0, 1, 2, 3]
    assert select(row, 1.0, backend) == [0, 1, 2, 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lower_index(backend):
    assert select([0.25, 0.25, 0.25, 0.25], 0.5, backend) == [0, 1]
    assert select([0.2, 0.3, 0.3, 0.2], 0.7, backend) == [0, 1, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_that_rounds_below_the_threshold_keeps_all_its_blocks(backend):
    # The original selects nothing where no rounded sum reaches the threshold.
    assert select([0.3, 0.3, 0.2, 0.19, 0.0], 0.9999, backend) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threshold", [0.3, 0.8, 0.99, 1.0])
@pytest.mark.parametrize("has_forced", [False, True])
def test_candidates_limits_and_forced_blocks(threshold, has_forced, backend):
    generator = torch.Generator().manual_seed(0)
    tiles = torch.arange(19)
    candidates = (tiles + 1).clamp(max=14)
    logits = torch.randn(2, 1, 19, 19, generator=generator) * 3
    logits = logits.masked_fill(tiles >= candidates[:, None], float("-inf"))
    probabilities = logits.softmax(-1)
    forced = torch.tensor([[4], [17]]) if has_forced else None
    rows = lists(
        probabilities,
        threshold,
        backend,
        candidates=candidates,
        limits=candidates - 1,
        forced=forced,
    )
    flat = probabilities.flatten(0, 2)
    for index, (row, kept) in enumerate(zip(flat, rows, strict=True)):
        tile = index % 19
        limit = int(candidates[tile]) - 1
        order = row[: limit + 1].argsort(descending=True, stable=True)
        before = row[order].double().cumsum(0) - row[order].double()
        expected = set(order.tolist() if threshold == 1 else order[before < threshold].tolist())
        if forced is not None:
            expected.add(int(forced.flatten()[index // 19]))
        assert kept == sorted(tile for tile in expected if tile < limit)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_candidates_list_nothing(backend):
    none = torch.zeros(2, dtype=torch.long)
    zeros = torch.zeros(1, 1, 2, 5)
    for threshold in (0.5, 1.0):
        assert lists(zeros, threshold, backend, candidates=none) == [[], []]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_covered_counts_towards_the_threshold(backend):
    row = [0.05, 0.25, 0.075, 0.125]  # the other half is computed anyway
    assert select(row, 0.9, backend, 0.5) == [1, 2, 3]
    assert select(row, 0.75, backend, 0.5) == [1]
    assert select(row, 0.76, backend, 0.5) == [1, 3]
    assert select(row, 0.5, backend, 0.5) == select(row, 0.3, backend, 0.5) == []
    assert select(row, 1.0, backend, 0.5) == [0, 1, 2, 3]
    # What no sum reaches keeps everything, whatever is covered.
    assert select(row, 0.9, backend, 0.25) == [0, 1, 2, 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forced_block_and_those_past_the_limits_are_covered_too(backend):
    row = [0.05, 0.25, 0.075, 0.125]
    forced = torch.tensor([[3]])
    # 0.5 + 0.125 + 0.25 = 0.875
    assert select(row, 0.87, backend, 0.5, forced=forced) == [1, 3]
    assert select(row, 0.6, backend, 0.5, forced=forced) == [3]
    # Without a credit the forced block only adds.
    assert select(row, 0.25, backend, forced=forced) == [1, 3]
    # Block 3 is computed anyway, though not listed.
    bounds = {"candidates": torch.tensor([4]), "limits": torch.tensor([3])}
    assert select(row, 0.87, backend, 0.5, **bounds) == [1]
    assert select(row, 0.88, backend, 0.5, **bounds) == [1, 2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threshold", [0.2, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("has_forced", [False, True])
def test_exact_scores_make_the_threshold_a_coverage_with_the_fewest_blocks(
    threshold, has_forced, backend
):
    generator = torch.Generator().manual_seed(1)
    tiles = torch.arange(9)
    logits = torch.randn(2, 2, 9, 10, generator=generator) * 3
    logits[..., :9].masked_fill_(tiles >= tiles[:, None], float("-inf"))
    masses = logits.softmax(-1)  # of the earlier blocks, and of what is computed anyway
    blocks, covered = masses[..., :9].contiguous(), masses[..., 9].contiguous()
    forced = torch.tensor([[4, 0], [8, 2]]) if has_forced else None
    rows = lists(
        blocks, threshold, backend, candidates=tiles, limits=tiles, forced=forced, covered=covered
    )
    for index, kept in enumerate(rows):
        row, own = blocks.flatten(0, 2)[index].double(), covered.flatten()[index].double()
        always = set()
        if forced is not None:
            always = {int(forced.flatten()[index // 9])} & set(range(index % 9))
        assert always <= set(kept) <= set(range(index % 9))
        reached = own + row[kept].sum()
        assert reached >= threshold - 1e-6
        chosen = [float(row[block]) for block in kept if block not in always]
        assert not chosen or reached - min(chosen) < threshold + 1e-6


def test_wrong_use_is_refused():
    arguments = {"threshold": 0.5, "candidates": torch.ones(1), "limits": torch.ones(1)}
    with pytest.raises(ValueError, match="expected probabilities"):
        select_top_p_blocks(torch.ones(1, 1, 1), **arguments)
    with pytest.raises(ValueError, match=r"expected covered \[1, 2, 3\], got \(1, 2\)"):
        select_top_p_blocks(torch.ones(1, 2, 3, 4), covered=torch.ones(1, 2), **arguments)
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        select_top_p_blocks(torch.ones(1, 1, 1, 1), backend="gpu", **arguments)
    wide = torch.ones(1).expand(1, 1, 1, MAX_KEY_TILES + 1)
    with pytest.raises(NotImplementedError, match="larger block_size"):
        select_top_p_blocks(wide, backend="triton", **arguments)


@pytest.mark.parametrize("threshold", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("max_scores", [1, 120, 1 << 23])
@pytest.mark.parametrize("grid", [None, BlockGrid(9 * 16, 9 * 16, 16, 16)], ids=["any", "causal"])
def test_pooled_blocks_are_those_of_the_softmax(threshold, max_scores, grid, monkeypatch):
    monkeypatch.setattr(triton, "MAX_SCORES", max_scores)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 9, 16, generator=generator) for heads in (2, 1))
    candidates = torch.arange(9)
    arguments = {
        "scale": 0.7,
        "threshold": threshold,
        "candidates": candidates,
        "limits": candidates,
        "forced": torch.tensor([[3], [5]]),
        "grid": grid,
    }
    blocks, counts = select_pooled_blocks(q, k, backend="triton", **arguments)
    expected, expected_counts = select_pooled_blocks(q, k, backend="reference", **arguments)
    assert torch.equal(counts, expected_counts)
    for ours, theirs, count in zip(
        blocks.flatten(0, 2), expected.flatten(0, 2), counts.flatten(), strict=True
    ):
        assert ours[:count].tolist() == theirs[:count].tolist()

from dataclasses import replace

import pytest
import torch

from pbs.ops import AttentionPlan, BlockGrid
from tests.ops.attention_truth import causal_mask


def make_plan(num_queries=100, num_keys=150, tile=16, density=0.4, seed=0, **options):
    grid = BlockGrid(num_queries, num_keys, tile, tile)
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, grid.num_query_tiles, grid.num_key_tiles)
    mask = torch.rand(shape, generator=generator) < density
    return AttentionPlan.from_block_mask(mask, grid, **options), mask


def segment_order(num_keys, segment, seed=0):
    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(num_keys).repeat(2, 3, 1)
    for start in range(0, num_keys // segment * segment, segment):
        for pair in order.flatten(0, 1):
            shuffled = torch.randperm(segment, generator=generator)
            pair[start : start + segment] = start + shuffled
    return order


def test_density_counts_tiles_over_causal_tiles():
    grid = BlockGrid(640, 640, 64, 64)
    nothing = torch.zeros(1, 1, 10, 10, dtype=torch.bool)
    plan = AttentionPlan.from_block_mask(nothing, grid)
    assert grid.num_causal_tiles == 55
    assert plan.density().item() == pytest.approx(10 / 55)
    full = AttentionPlan.from_block_mask(~nothing, grid)
    assert full.density().item() == 1
    assert torch.equal(full.block_mask()[0, 0], torch.ones(10, 10, dtype=torch.bool).tril())


@pytest.mark.parametrize("tile", [16, 32])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(150, 150), (100, 150), (1, 40), (7, 7)])
def test_every_tile_selected_is_plain_causal_attention(num_queries, num_keys, tile):
    plan, _ = make_plan(num_queries, num_keys, tile, density=2.0)
    assert torch.equal(plan.token_mask()[1, 2], causal_mask(num_queries, num_keys))
    assert (plan.density() == 1).all()
    dense = AttentionPlan.dense(plan.grid, 2, 3, device="cpu", reason="test")
    assert dense.density().shape == (2, 3)
    assert torch.equal(dense.token_mask(), plan.token_mask())


def test_block_mask_is_what_was_selected_and_the_diagonal():
    plan, mask = make_plan(160, 160)
    diagonal = torch.eye(10, dtype=torch.bool)
    expected = (mask & torch.ones(10, 10, dtype=torch.bool).tril(-1)) | diagonal
    assert torch.equal(plan.block_mask(), expected)
    expected_tokens = expected.repeat_interleave(16, -1).repeat_interleave(16, -2)
    assert torch.equal(plan.token_mask(), expected_tokens & causal_mask(160, 160))


def test_own_segment_is_computed_whole_and_in_natural_order():
    order = segment_order(150, 48)
    plan, _ = make_plan(150, 150, 16, density=0.0, segment_size=48, order=order)
    seen = plan.token_mask()[0, 0]
    for row in range(150):
        own = torch.arange(row // 48 * 48, row + 1)
        assert seen[row].nonzero().flatten().tolist() == own.tolist()


def test_blocks_hold_the_keys_that_the_order_moved_there():
    order = segment_order(150, 32)
    plan, _ = make_plan(150, 150, 16, density=0.5, segment_size=32, order=order)
    tiles, seen = plan.block_mask(), plan.token_mask()
    tile = int(tiles[1, 2, 9, :4].nonzero()[0])
    members = plan.key_order()[1, 2, tile * 16 : tile * 16 + 16]
    assert seen[1, 2, 144:][:, members].all()


def test_order_of_one_head_group_serves_all_its_query_heads():
    plan, _ = make_plan(150, 150)
    shared = segment_order(150, 48)[:, :1]
    plan = replace(plan, order=shared)
    assert torch.equal(plan.key_order(), shared.expand(2, 3, -1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"blocks": p.blocks + 1}, "reaches past the first query"),
        (lambda p: {"blocks": p.blocks.flip(-1)}, "must ascend"),
        (lambda p: {"blocks": p.blocks - 9}, "outside"),
        (lambda p: {"num_blocks": p.num_blocks + 99}, "num_blocks outside"),
        (lambda p: {"blocks": p.blocks[..., :0]}, "is empty"),
        (lambda p: {"blocks": p.blocks[:, :2]}, "expected blocks"),
        (lambda p: {"windows": p.windows.float()}, "expected integer windows"),
        (lambda p: {"windows": p.windows.short()}, "windows of at least 32 bits, got torch.int16"),
        (lambda p: {"windows": p.windows + 500}, "windows has entries outside"),
        (lambda p: {"columns": p.windows}, "go together"),
        (lambda p: {"columns": p.windows + 1, "num_columns": p.num_windows}, "a column lies after"),
        (lambda p: {"order": torch.zeros(2, 3, 160, dtype=torch.long)}, "not a permutation"),
        (lambda p: {"order": torch.zeros(2, 3, 10, dtype=torch.long)}, "expected order"),
        (lambda p: {"query_order": torch.zeros(2, 3, 9, dtype=torch.long)}, "expected query_order"),
    ],
)
def test_inconsistent_plans_are_refused(change, message):
    plan, _ = make_plan(160, 160)
    with pytest.raises((ValueError, TypeError), match=message):
        replace(plan, **change(plan))


def test_token_mask_refuses_a_pair_named_twice():
    plan, _ = make_plan(160, 160, density=1.0)
    columns = torch.zeros(1, 1, 10, 1, dtype=torch.int32)
    counts = torch.ones(1, 1, 10, dtype=torch.int32)
    with pytest.raises(ValueError, match="more than once"):
        replace(plan, columns=columns, num_columns=counts).token_mask()


@pytest.mark.parametrize(("num_queries", "num_keys"), [(0, 4), (5, 4), (-1, 3)])
def test_grid_refuses_impossible_lengths(num_queries, num_keys):
    with pytest.raises(ValueError, match="num_queries <= num_keys"):
        BlockGrid(num_queries, num_keys, 16, 16)


def test_wrong_block_mask_shape_is_refused():
    with pytest.raises(ValueError, match="expected a block mask"):
        AttentionPlan.from_block_mask(torch.ones(1, 1, 3, 4, dtype=bool), BlockGrid(64, 64, 16, 16))

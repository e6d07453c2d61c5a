import pytest
import torch

from pbs import BlockGrid
from pbs.ops.antidiagonal import antidiagonal_block_sums, query_groups, reference
from pbs.testing import make_qkv


def naive_sums(q, k, stride, scale, block, limits=None):
    """Group by group, straight from the formula."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    offset = num_keys - num_queries
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    query_groups_count = -(-num_queries // stride)
    key_groups_count = -(-num_keys // stride)
    logits = torch.full((*q.shape[:2], query_groups_count, key_groups_count), float("-inf"))
    for g in range(query_groups_count):
        last = min((g + 1) * stride, num_queries) - 1 + offset
        for f in range(key_groups_count):
            if f * stride > last:
                continue
            if limits is not None and f * stride >= limits[g * stride // block] * block:
                continue
            total = torch.zeros(q.shape[:2])
            for t in range(stride):
                row, column = g * stride + stride - 1 - t, f * stride + t
                if row < num_queries and column < num_keys:
                    total += (q[:, :, row] * k[:, :, column]).sum(-1)
            logits[:, :, g, f] = total * scale / stride
    weights = logits.softmax(-1).nan_to_num(0.0)
    tiles = (-(-num_queries // block), -(-num_keys // block))
    sums = torch.zeros(*q.shape[:2], *tiles)
    per = block // stride
    for g in range(query_groups_count):
        for f in range(key_groups_count):
            sums[:, :, g // per, f // per] += weights[:, :, g, f]
    return sums


@pytest.mark.parametrize(("num_queries", "num_keys"), [(64, 64), (50, 50), (33, 81), (1, 20)])
@pytest.mark.parametrize("has_limits", [False, True])
@pytest.mark.parametrize("chunk", [1, 1 << 26])
def test_sums_follow_the_formula_in_chunks_and_whole(
    num_queries, num_keys, has_limits, chunk, monkeypatch
):
    monkeypatch.setattr(reference, "MAX_LOGITS", chunk)
    q, k, _ = make_qkv(2, 4, 2, num_keys, 8, num_queries=num_queries)
    grid = BlockGrid(num_queries, num_keys, 16, 16)
    limits = grid.past_tiles(segment_size=16).sum(-1) if has_limits else None
    sums = antidiagonal_block_sums(q, k, stride=4, scale=0.4, grid=grid, limits=limits)
    expected = naive_sums(q, k, 4, 0.4, 16, limits)
    torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-5)
    if not has_limits:
        rows = query_groups(grid, 4, q.device).squeeze(-1)
        torch.testing.assert_close(sums.sum(-1), rows.float().expand(2, 4, -1))


@pytest.mark.parametrize(("num_queries", "num_keys"), [(160, 160), (33, 150)])
@pytest.mark.parametrize(("tile", "stride"), [(32, 4), (16, 16)])
@pytest.mark.parametrize("has_limits", [False, True])
def test_kernel_matches_the_reference(num_queries, num_keys, tile, stride, has_limits):
    q, k, _ = make_qkv(1, 2, 1, num_keys, 24, num_queries=num_queries, dtype=torch.float16)
    grid = BlockGrid(num_queries, num_keys, tile, tile)
    limits = grid.past_tiles().sum(-1) if has_limits else None
    arguments = {"stride": stride, "scale": 0.3, "grid": grid, "limits": limits}
    ours = antidiagonal_block_sums(q, k, backend="triton", **arguments)
    expected = antidiagonal_block_sums(q.float(), k.float(), backend="reference", **arguments)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_wrong_use_is_refused():
    q, k, _ = make_qkv(1, 2, 1, 64, 16)
    grid = BlockGrid(64, 64, 16, 16)
    with pytest.raises(ValueError, match="stride must divide the block size, got stride 5"):
        antidiagonal_block_sums(q, k, stride=5, scale=1.0, grid=grid)
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        antidiagonal_block_sums(q, k, stride=4, scale=1.0, grid=grid, backend="cuda")

"""A threshold that is a coverage: what a query computes anyway counts towards it."""

import pytest
import torch

from pbs import BlockGrid, build_method
from pbs.ops.antidiagonal import antidiagonal_block_sums, own, own_logsumexp
from pbs.ops.grid import candidate_tiles
from pbs.orders import adaptive
from pbs.selectors import build_selector
from pbs.selectors.own import OwnKeys
from pbs.testing import make_qkv
from tests.methods.equal_coverage import plan_coverage, query_tile_masses
from tests.ops.attention_truth import causal_mask
from tests.ops.test_plan import segment_order

PARAMS = {"block_size": 16, "segment_size": 64}
TARGETS = ("keys", "queries", "keys_then_queries", "queries_then_keys")


def sharp_slashes(num_tokens=1024, head_dim=64):
    """Every query looks at itself and 300 tokens back."""
    angles = torch.arange(float(num_tokens))[:, None] * torch.linspace(0.05, 3, head_dim // 2)
    k = torch.cat([angles.cos(), angles.sin()], -1)[None, None] * 3
    return ((k + k.roll(300, dims=2)) / 2).expand(-1, 2, -1, -1), k


def tile_coverage(q, k, plan, scale, tile):
    """Dense attention on the pairs of the plan, mean over the queries of each tile, fp64."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q.double() @ k.double().transpose(-1, -2) * scale
    future = ~causal_mask(q.shape[2], k.shape[2])
    covered = logits.masked_fill(future, float("-inf")).softmax(-1)
    covered = (covered * plan.token_mask()).sum(-1)
    if plan.query_order is not None:
        covered = covered.gather(-1, plan.query_order)
    return torch.stack([part.mean(-1) for part in covered.split(tile, dim=-1)], -1)


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("num_queries", [400, 173])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("structure", ["mixed", "slash"])
def test_exact_scores_make_the_threshold_a_coverage(structure, target, num_queries, threshold):
    q, k, _ = make_qkv(2, 4, 2, 400, 32, num_queries=num_queries, structure=structure)
    method = build_method(
        "pbs",
        selector="oracle",
        selector_params={"normaliser": "causal"},
        threshold=threshold,
        target=target,
        **PARAMS,
    )
    plan = method.plan(q, k)
    coverage = tile_coverage(q, k, plan, 32**-0.5, 16)
    assert coverage.min() >= threshold - 1e-5
    lavish = build_method("pbs", selector="oracle", threshold=threshold, target=target, **PARAMS)
    assert plan.density().mean() < lavish.plan(q, k).density().mean()


@pytest.mark.parametrize("force_select_first_block", [True, False])
@pytest.mark.parametrize("gqa", ["per_query_head", "shared"])
@pytest.mark.parametrize("order", ["none", "last_block", "adaptive"])
def test_the_credit_lowers_the_density_of_antidiagonal_scores(order, gqa, force_select_first_block):
    density = {}
    for normaliser in ("candidates", "causal"):
        method = build_method(
            "pbs_plus",
            normaliser=normaliser,
            order=order,
            gqa=gqa,
            force_select_first_block=force_select_first_block,
            threshold=0.9,
            **PARAMS,
        )
        density[normaliser] = method.plan(*sharp_slashes(), scale=0.125).density().mean()
    assert density["causal"] < density["candidates"] - 0.005


@pytest.mark.parametrize("num_queries", [120, 77])
@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("max_elements", [1, 1 << 22])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_own_groups_are_natural_keys_in_one_softmax_with_moved_candidates(
    num_queries, moves, max_elements, backend, monkeypatch
):
    """Straight from the formula, group by group."""
    monkeypatch.setattr(own, "MAX_ELEMENTS", max_elements)
    block, segment, stride, num_keys = 16, 32, 4, 120
    q, k, _ = make_qkv(2, 4, 2, num_keys, 8, num_queries=num_queries)
    grid = BlockGrid(num_queries, num_keys, block, block)
    query_order = None
    if moves:
        query_order = segment_order(num_queries, segment)[:1, :1].expand(2, 4, -1)
        short = query_order.shape[-1]
        query_order = torch.cat(
            [query_order, torch.arange(short, num_queries).expand(2, 4, -1)], -1
        )
        q = q.gather(2, query_order[..., None].expand_as(q))
    segments = {"segment_size": segment, "query_segment": segment if moves else 0}
    candidates, limits = candidate_tiles(grid, q.device, **segments)
    owned = OwnKeys.of(k, grid, query_order=query_order, **segments)
    positions = owned.positions(grid).expand(2, 4, -1)
    moved = k.flip(2).roll(5, dims=2)  # any other keys: those of the candidates
    beside = own_logsumexp(
        q, k, stride=stride, scale=0.4, grid=grid, starts=limits * block, width=owned.width,
        positions=positions,
    )  # fmt: skip
    sums = antidiagonal_block_sums(
        q, moved, stride=stride, scale=0.4, grid=grid, limits=limits, beside=beside,
        backend=backend,
    )  # fmt: skip

    def score(keys, g, f):
        total = torch.zeros(2, 4)
        for t in range(stride):
            row, column = g * stride + stride - 1 - t, f * stride + t
            if row < num_queries and column < num_keys:
                total += (q[:, :, row] * keys.repeat_interleave(2, 1)[:, :, column]).sum(-1)
        return total * 0.4 / stride

    expected = torch.zeros_like(sums)
    for g in range(-(-num_queries // stride)):
        first = int(limits[g * stride // block]) * block // stride
        latest = positions[:, :, g * stride : (g + 1) * stride].amax(-1)
        logits = [score(moved, g, f) for f in range(first)]
        for f in range(first, -(-num_keys // stride)):
            logits.append(score(k, g, f).masked_fill(f * stride > latest, float("-inf")))
        weights = torch.stack(logits, -1).softmax(-1)
        for f in range(first):
            expected[:, :, g * stride // block, f * stride // block] += weights[..., f]
    torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-5)
    assert not sums.masked_select(~candidates).any()


@pytest.mark.parametrize("selector", ["antidiagonal", "oracle"])
def test_scores_and_credit_sum_to_one(selector):
    q, k, _ = make_qkv(2, 4, 2, 150, 16, structure="mixed")
    grid = BlockGrid(150, 150, 16, 16)
    candidates, _ = candidate_tiles(grid, q.device, segment_size=32)
    arguments = {"scale": 0.25, "grid": grid, "candidates": candidates}
    causal = build_selector(selector, {"normaliser": "causal"})
    shares, covered = causal.block_scores(q, k, own=None, **arguments)
    assert torch.equal(causal.block_probabilities(q, k, **arguments), shares)
    torch.testing.assert_close(shares.sum(-1) + covered, torch.ones(2, 4, 10))
    assert (covered[:, :, :2] == 1).all()
    assert ((covered[:, :, 2:] > 0) & (covered[:, :, 2:] < 1)).all()
    # Neither q nor k has moved: what is given is what is found.
    given = OwnKeys.of(k, grid, segment_size=32)
    again, covered_again = causal.block_scores(q, k, own=given, **arguments)
    torch.testing.assert_close(again, shares)
    torch.testing.assert_close(covered_again, covered)
    relative, none = build_selector(selector, {}).block_scores(q, k, own=None, **arguments)
    assert none is None
    torch.testing.assert_close(relative.sum(-1)[:, :, 2:], torch.ones(2, 4, 8))


def test_the_adaptive_order_walks_through_what_a_credited_threshold_selects():
    q, k, _ = make_qkv(1, 2, 1, 256, 16, structure="vertical")
    params = {
        "block_size": 32,
        "segment_size": 64,
        "order": "none",
        "selector": "antidiagonal",
        "selector_params": {"normaliser": "causal"},
    }
    tiles = query_tile_masses(q, k, 0.25, 32)
    grid = BlockGrid(256, 256, 32, 32)
    candidates = grid.past_tiles(segment_size=64)
    probabilities, covered = build_method("pbs", **params)._selector.block_scores(
        q, k, scale=0.25, grid=grid, candidates=candidates, own=None
    )
    rows = torch.arange(256)
    natural = adaptive.Arrangement(rows.expand(1, 2, -1), probabilities, probabilities)
    group = adaptive._Group.of(0, q, k, natural)
    masses, _ = group.block_masses(rows, rows.expand(1, 2, -1), scale=0.25, grid=grid)
    forced = (torch.arange(8) == 0)[None, None, None]
    which = rows // 32
    entry, reached = adaptive._walk(
        probabilities[:, :, which], forced, masses, candidates[which], covered[:, :, which]
    )
    for threshold in (0.3, 0.6, 0.9):
        plan = build_method("pbs", threshold=threshold, **params).plan(q, k, scale=0.25)
        count = (entry < threshold).sum(-1)
        assert torch.equal(count[0] // 32, plan.num_blocks.sum(-1)[0])
        coverage = reached.gather(-1, count[..., None] - 1)[0, :, 0]
        torch.testing.assert_close(coverage.float(), plan_coverage(tiles, plan, 64))


def test_an_unknown_normaliser_is_refused():
    for selector in ("antidiagonal", "oracle"):
        with pytest.raises(ValueError, match="normaliser"):
            build_selector(selector, {"normaliser": "rows"})

"""Random blocks: the density is exact, the draw uniform and the same wherever it is made."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from pbs import build_method


def inputs(num_keys, *, num_queries=None, batch=1, heads=4, device="cpu"):
    """What the method does not look at: zeros."""
    q = torch.zeros(batch, heads, num_queries or num_keys, 16, device=device)
    return q, torch.zeros(batch, heads // 2, num_keys, 16, device=device)


def drawn(num_keys, *, num_queries=None, heads=4, layer_idx=None, **params):
    """Computed blocks, bool ``[Hq, Tq, Tk]``."""
    q, k = inputs(num_keys, num_queries=num_queries, heads=heads)
    method = build_method("random_blocks", block_size=16, **params)
    return method.plan(q, k, layer_idx=layer_idx).block_mask()[0]


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize("density", [0.1, 0.2, 1 / 3, 0.5, 0.77, 0.99, 1])
@pytest.mark.parametrize("num_keys", [16, 640, 1024, 1000, 1601])
def test_density_is_met_within_one_tile_in_every_head(num_keys, density, sink):
    q, k = inputs(num_keys)
    params = {"density": density, "force_select_first_block": sink}
    plan = build_method("random_blocks", block_size=16, **params).plan(q, k)
    tiles = plan.grid.num_query_tiles
    forced = 2 * tiles - 1 if sink else tiles
    expected = max(density * plan.grid.num_causal_tiles, forced)
    assert (plan.num_tiles() - expected).abs().max() <= 0.5
    assert plan.num_tiles().unique().numel() == 1


def test_density_holds_up_to_every_query_tile_and_grows_in_proportion():
    counts = drawn(4096, density=0.3)[0].sum(-1)
    rows = torch.arange(1, len(counts) + 1)
    behind = counts.cumsum(0) - 0.3 * rows.cumsum(0)
    # Two blocks a row are forced: more than the density in the first rows, made up by the next.
    made_up = int((behind[1:] <= 0.5).int().argmax()) + 1
    assert made_up <= 4 / 0.3
    assert (counts[1:made_up] == 2).all()
    assert (behind[made_up:].abs() <= 0.5).all()
    assert ((counts - 0.3 * rows)[made_up + 1 :].abs() <= 1).all()


@pytest.mark.parametrize("sink", [True, False])
def test_the_diagonal_and_the_first_block_are_always_computed(sink):
    mask = drawn(640, density=0.3, force_select_first_block=sink)
    assert mask[:, torch.arange(40), torch.arange(40)].all()
    assert bool(mask[:, :, 0].all()) is sink


def test_every_free_block_is_drawn_equally_often():
    """4096 heads draw a third of the blocks of the last query tile; so do other pairs of blocks."""
    mask = drawn(16 * 33, heads=4096, density=1 / 3)[:, -1]
    free = mask[:, 1:-1].numpy()
    assert len(set(free.sum(-1))) == 1
    assert chisquare(free.sum(0)).pvalue > 0.01
    # Drawn without replacement, blocks are independent but for the fixed count.
    num, size = free[0].sum(), free.shape[1]
    together = (free.T.astype(float) @ free)[np.triu_indices(size, 1)]
    share = num * (num - 1) / (size * (size - 1))
    assert abs(together.mean() / len(free) - share) < 1e-12
    deviations = (together - len(free) * share) / np.sqrt(len(free) * share * (1 - share))
    assert 0.8 < deviations.std() < 1.2


def test_rows_heads_layers_and_seeds_draw_apart():
    base = drawn(1024, density=0.4)
    others = [
        *base[1:],
        drawn(1024, density=0.4, layer_idx=0)[0],
        drawn(1024, density=0.4, layer_idx=1)[0],
        drawn(1024, density=0.4, seed=1)[0],
        drawn(1024, density=0.4, seed=1, layer_idx=0)[0],
    ]
    free = torch.ones(64, 64, dtype=torch.bool).tril(-1)
    free[:, 0] = False
    rates = [float((base[0] & one & free).sum() / (base[0] & free).sum()) for one in others]
    # Of what one draws, the other draws about as much as the density.
    assert all(0.3 < rate < 0.5 for rate in rates)
    rows = base[0, 40:, 1:40]
    assert len(rows.unique(dim=0)) == len(rows)


def test_the_same_call_draws_the_same_for_every_sequence_of_a_batch():
    q, k = inputs(640, batch=3)
    method = build_method("random_blocks", block_size=16, density=0.4)
    mask = method.plan(q, k, layer_idx=2).block_mask()
    assert torch.equal(mask, method.plan(q + 1, k - 1, layer_idx=2).block_mask())
    assert torch.equal(mask[0], mask[2])
    assert torch.equal(mask[0], drawn(640, density=0.4, layer_idx=2))


@pytest.mark.parametrize("chunk", [16, 160, 336])
@pytest.mark.parametrize("num_keys", [1024, 1000])
def test_chunks_draw_what_the_whole_prompt_draws(num_keys, chunk):
    whole = drawn(num_keys, density=0.3, layer_idx=1)
    for start in range(0, num_keys, chunk):
        end = min(start + chunk, num_keys)
        part = drawn(end, num_queries=end - start, density=0.3, layer_idx=1)
        rows = slice(start // 16, -(-end // 16))
        assert torch.equal(part, whole[:, rows, : part.shape[-1]])
        assert not whole[:, rows, part.shape[-1] :].any()


@pytest.mark.parametrize(("num_keys", "num_queries"), [(1001, 500), (1000, 490), (257, 9)])
def test_queries_that_begin_inside_a_block_meet_the_density_too(num_keys, num_queries):
    q, k = inputs(num_keys, num_queries=num_queries)
    plan = build_method("random_blocks", block_size=16, density=0.5).plan(q, k)
    assert (plan.num_tiles() - 0.5 * plan.grid.num_causal_tiles).abs().max() <= 1


def test_the_densest_setting_computes_every_tile():
    method = build_method("random_blocks", block_size=32, density=0.2, seed=3)
    assert method.densest() == build_method("random_blocks", block_size=32, density=1.0, seed=3)
    q, k = inputs(300)
    assert (method.densest().plan(q, k).density() == 1).all()


@pytest.mark.gpu
def test_a_gpu_draws_what_the_cpu_draws():
    method = build_method("random_blocks", density=0.3, seed=5)
    on_cpu = method.plan(*inputs(8192), layer_idx=7).block_mask()
    on_gpu = method.plan(*inputs(8192, device="cuda"), layer_idx=7).block_mask()
    assert torch.equal(on_gpu.cpu(), on_cpu)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"density": 0.0}, ValueError, r"density must lie in \(0, 1\], got 0.0"),
        ({"density": 1.1}, ValueError, "density must lie in"),
        ({"density": float("nan")}, ValueError, "density must lie in"),
        ({"density": "half"}, TypeError, "density must be a number"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 0.5}, TypeError, "seed"),
        ({"block_size": 24}, ValueError, "block_size must be a power of two"),
    ],
)
def test_wrong_parameters_are_refused(params, error, message):
    with pytest.raises(error, match=message):
        build_method("random_blocks", **params)

"""The Triton kernel on a CUDA device, in the dtypes models use: ``make test-gpu``."""

import pytest
import torch

from baselines.vertical_slash import vertical_slash_lists
from pbs import BlockGrid, block_sparse_attention
from pbs.ops.antidiagonal import antidiagonal_block_sums
from pbs.ops.block_selection import select_pooled_blocks, select_top_p_blocks
from pbs.ops.dense import choose_dense_kernel, dense_attention
from pbs.ops.key_power_sums import key_power_sums
from pbs.ops.largest_within import largest_within
from pbs.ops.last_query_scores import last_query_scores
from pbs.ops.permutation import (
    gather_and_pool,
    gather_keys,
    importance_order,
    key_importance,
    sort_segments,
)
from pbs.ops.pooling import mean_pool
from pbs.ops.quantisation import channel_scales, quantise_rows, quantise_values
from pbs.ops.tile_logsumexp import tile_logsumexp
from pbs.ops.tile_masses import tile_masses
from pbs.testing import assert_within_budget, make_qkv
from tests.methods.cases import CASES, build
from tests.ops.attention_truth import causal_mask, eager_attention, exact_attention
from tests.ops.test_block_sparse_attention import random_plan
from tests.ops.test_plan import segment_order

pytestmark = pytest.mark.gpu


def to_device(plan):
    """The same plan on the GPU."""
    from dataclasses import fields, replace

    tensors = {
        field.name: value.cuda()
        for field in fields(plan)
        if isinstance(value := getattr(plan, field.name), torch.Tensor)
    }
    return replace(plan, **tensors)


def check(q, k, v, plan):
    mask, scale = plan.token_mask(), q.shape[3] ** -0.5
    out = block_sparse_attention(q.cuda(), k.cuda(), v.cuda(), to_device(plan)).cpu()
    assert_within_budget(
        out, eager_attention(q, k, v, mask, scale), exact_attention(q, k, v, mask, scale)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tile", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(513, 513), (100, 700)])
def test_kernel_matches_the_plans_token_mask(num_queries, num_keys, head_dim, tile, dtype):
    q, k, v = make_qkv(2, 4, 2, num_keys, head_dim, num_queries=num_queries, dtype=dtype)
    check(q, k, v, random_plan(2, 4, BlockGrid(num_queries, num_keys, tile, tile)))


@pytest.mark.parametrize("order_heads", [1, 4])
def test_reordered_keys(order_heads):
    q, k, v = make_qkv(2, 4, 1, 1000, 128, dtype=torch.bfloat16, structure="vertical")
    order = segment_order(1000, 256)[:, :1].repeat(1, order_heads, 1)
    plan = random_plan(2, 4, BlockGrid(1000, 1000, 128, 128), segment_size=256, order=order)
    check(q, k, v, plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("tile", [128, 256])
def test_hopper_kernel_agrees_with_the_triton_kernel(tile, head_dim, dtype):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Hopper kernel runs on Hopper alone")
    # Keys as models have them: sequences, tokens, heads; a length that divides nothing.
    q, k, v = (
        x.transpose(1, 2).contiguous().transpose(1, 2).cuda()
        for x in make_qkv(2, 8, 2, 3000, head_dim, num_queries=2900, dtype=dtype)
    )
    order = segment_order(3000, 2 * tile)[:, :2]
    grid = BlockGrid(2900, 3000, tile, tile)
    plan = to_device(random_plan(2, 8, grid, segment_size=2 * tile, order=order))
    ours = block_sparse_attention(q, k, v, plan, backend="hopper")
    other = block_sparse_attention(q, k, v, plan, backend="triton")
    torch.testing.assert_close(ours, other, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("order_heads", [0, 2, 8])
def test_eight_bits_err_as_much_as_their_emulation(order_heads, head_dim, dtype):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("eight-bit products run on Hopper alone")
    q, k, v = make_qkv(2, 8, 2, 1500, head_dim, num_queries=1400, dtype=dtype)
    order = segment_order(1500, 256)[:, :1].repeat(1, order_heads, 1) if order_heads else None
    grid = BlockGrid(1400, 1500, 128, 128)
    plan = random_plan(2, 8, grid, segment_size=256, order=order)
    emulated = block_sparse_attention(q, k, v, plan, backend="reference", precision="fp8")
    out = block_sparse_attention(q.cuda(), k.cuda(), v.cuda(), to_device(plan), precision="fp8")
    exact = exact_attention(q, k, v, plan.token_mask(), head_dim**-0.5)
    assert_within_budget(out.cpu(), emulated, exact)


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_eight_bit_copies_match_their_reference(head_dim, moved):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no e4m3 on this device")
    _, k, _ = make_qkv(2, 4, 2, 1000, head_dim, dtype=torch.bfloat16)
    order = segment_order(1000, 256)[:, :1].repeat(1, 4, 1) if moved else None
    on_gpu = None if order is None else order.cuda()
    scales = channel_scales(k)
    expected = quantise_values(k, scales, tile=128, order=order)
    found = quantise_values(k.cuda(), scales.cuda(), tile=128, order=on_gpu)
    assert torch.equal(found.cpu().float(), expected.float())
    shift = k.float().mean(dim=2)
    expected, scales = quantise_rows(k, tile=128, order=order, shift=shift, rotated=True)
    found, found_scales = quantise_rows(
        k.cuda(), tile=128, order=on_gpu, shift=shift.cuda(), rotated=True
    )
    torch.testing.assert_close(found_scales.cpu(), scales, rtol=1e-2, atol=0)
    # Factors of bf16 are off by up to 448 / 2^9, and a quotient may round to the next step.
    torch.testing.assert_close(found.cpu().float(), expected.float(), rtol=0.13, atol=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("where", ["k", "v"])
def test_what_is_not_finite_reaches_only_rows_that_see_it(where, head_dim, dtype):
    q, k, v = (x.cuda() for x in make_qkv(1, 2, 1, 600, head_dim, dtype=dtype))
    grid = BlockGrid(600, 600, 128, 128)
    plan = to_device(random_plan(1, 2, grid, segment_size=256))
    backends = ["triton"]
    is_hopper = torch.cuda.get_device_capability() == (9, 0) and dtype != torch.float32
    if is_hopper and where == "k":  # its values do reach others, as it says
        backends.append("hopper")
    for backend in backends:
        expected = block_sparse_attention(q, k, v, plan, backend=backend)
        bad_k, bad_v = k.clone(), v.clone()
        (bad_k if where == "k" else bad_v)[:, :, 330] = float("nan")
        out = block_sparse_attention(q, bad_k, bad_v, plan, backend=backend)
        rows = torch.arange(600) < 330
        torch.testing.assert_close(out[:, :, rows], expected[:, :, rows], rtol=1e-2, atol=1e-3)
        assert out[:, :, 330:512].isnan().all()


@pytest.mark.parametrize("case", sorted(CASES))
def test_methods_plan_and_compute_the_same_on_both_devices(case):
    q, k, v = make_qkv(1, 4, 2, 600, 64, structure="mixed")
    method = build(case)
    on_cpu, on_gpu = method.plan(q, k), method.plan(q.cuda(), k.cuda())
    differing = (on_cpu.block_mask() ^ on_gpu.block_mask().cpu()).float().mean().item()
    assert differing < 0.02  # rounding decides about blocks at the threshold
    out = method(q.cuda(), k.cuda(), v.cuda()).cpu()
    mask = on_gpu.token_mask().cpu()
    expected = exact_attention(q, k, v, mask, 64**-0.5).float()
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", sorted(CASES))
def test_densest_setting_equals_dense_attention_in_bf16(case):
    q, k, v = make_qkv(2, 4, 2, 700, 64, dtype=torch.bfloat16, structure="mixed")
    mask, scale = causal_mask(700, 700), 64**-0.5
    out = build(case, densest=True)(q.cuda(), k.cuda(), v.cuda()).cpu()
    assert_within_budget(
        out, eager_attention(q, k, v, mask, scale), exact_attention(q, k, v, mask, scale)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("segment_size", [256, 2048])
def test_permutation_kernels_match_their_references(segment_size, dtype):
    q, k, _ = make_qkv(2, 4, 2, 9000, 128, num_queries=128, dtype=dtype, structure="vertical")
    scores = key_importance(q.cuda(), k.cuda(), scale=0.1)
    expected = key_importance(q, k, scale=0.1, backend="reference")
    torch.testing.assert_close(scores.cpu(), expected, rtol=1e-2, atol=1e-6)
    scores = scores[..., : 9000 // segment_size * segment_size]
    arguments = {"num_keys": 9000, "segment_size": segment_size}
    order = sort_segments(scores, **arguments)
    assert torch.equal(order.cpu(), sort_segments(scores.cpu(), **arguments))
    assert torch.equal(gather_keys(k.cuda(), order).cpu(), gather_keys(k, order.cpu()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("segment_size", [128, 256, 384, 512])
def test_fused_order_gather_and_means_match_their_references(segment_size, head_dim, dtype):
    q, k, _ = make_qkv(2, 8, 2, 5000, head_dim, num_queries=128, dtype=dtype, structure="vertical")
    order = importance_order(q.cuda(), k.cuda(), scale=0.1, segment_size=segment_size).cpu()
    num_sorted = 5000 // segment_size * segment_size
    scores = key_importance(q, k[:, :, :num_sorted], scale=0.1, backend="reference")
    segments = order[..., :num_sorted].unflatten(-1, (-1, segment_size))
    expected = torch.arange(num_sorted).unflatten(-1, (-1, segment_size))
    assert torch.equal(segments.sort(-1).values, expected.expand_as(segments))
    ranked = scores.gather(-1, order[..., :num_sorted]).unflatten(-1, (-1, segment_size))
    assert (ranked.diff(dim=-1) <= 2e-2 * ranked[..., :-1] + 1e-9).all()
    gathered, means = gather_and_pool(k.cuda(), order.cuda(), tile=128)
    assert torch.equal(gathered.cpu(), gather_keys(k, order))
    torch.testing.assert_close(means.cpu(), mean_pool(gather_keys(k, order), 128))
    torch.testing.assert_close(mean_pool(k.cuda(), 128).cpu(), mean_pool(k, 128))


@pytest.mark.parametrize(("tile", "dtype"), [(128, torch.bfloat16), (8, torch.float32)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_log_sums_of_tiles_match_their_reference(tile, dtype, head_dim):
    q, k, _ = make_qkv(2, 8, 2, 1000, head_dim, dtype=dtype, structure="mixed")
    moved = k.roll(1, dims=2)
    until = torch.arange(1000).expand(8, -1) + 1
    ends = until // 256 * 256
    arguments = {"tile": tile, "scale": head_dim**-0.5}
    expected = tile_logsumexp(q, moved, ends, natural=k, until=until, **arguments)
    got = tile_logsumexp(
        *(x.cuda() for x in (q, moved, ends)), natural=k.cuda(), until=until.cuda(), **arguments
    )
    torch.testing.assert_close(got.cpu(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("num_entries", [1000, 131072])
def test_the_largest_entries_within_a_goal_match_their_reference(num_entries):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(8, num_entries, generator=generator) * 3).softmax(dim=-1)
    expected = largest_within(x, 0.9).counts(x)
    got = largest_within(x.cuda(), 0.9).counts(x.cuda()).cpu()
    assert ((got - expected).abs() <= 1 + expected // 1000).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("head_dim", "last_q"), [(64, 64), (128, 128), (128, 7)])
def test_last_query_scores_match_their_reference(head_dim, last_q, dtype):
    q, k, _ = make_qkv(2, 8, 2, 1000, head_dim, dtype=dtype, structure="mixed")
    settings = {"scale": head_dim**-0.5, "last_q": last_q}
    expected = last_query_scores(q, k, **settings)
    got = last_query_scores(q.cuda(), k.cuda(), **settings)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, atol=1e-3, rtol=1e-2)


def test_vertical_slash_lists_match_their_reference():
    generator = torch.Generator().manual_seed(0)
    columns, offsets = (torch.rand(2, 4, 3000, generator=generator) < 0.02 for _ in "ab")
    offsets[..., 0] = True
    grid = BlockGrid(3000, 3000, 64, 64)
    expected = vertical_slash_lists(columns, offsets, grid)
    got = vertical_slash_lists(columns.cuda(), offsets.cuda(), grid)
    for name in ("windows", "columns"):
        counts = getattr(expected, f"num_{name}")
        assert torch.equal(getattr(got, f"num_{name}").cpu(), counts)
        slots = torch.arange(getattr(expected, name).shape[-1])
        valid = slots < counts[..., None]
        ours = getattr(got, name).cpu()[..., : len(slots)]
        assert torch.equal(ours[valid], getattr(expected, name)[valid])


@pytest.mark.parametrize("num_tiles", [63, 1000, 4096])
def test_masses_of_tiles_match_their_reference(num_tiles):
    generator = torch.Generator().manual_seed(0)
    sums, smooth = (torch.randn(2, 3, 5, 8, num_tiles, generator=generator) * 9 for _ in "ab")
    counts = torch.tensor([8, 8, 3, 1, 8], dtype=torch.int32)
    limits = torch.tensor([0, 5, num_tiles // 2, num_tiles - 1, num_tiles], dtype=torch.int32)
    smooth = smooth.masked_fill(torch.arange(num_tiles) >= limits[:, None, None], float("-inf"))
    settings = {"power": 4.0, "share": 0.5}
    expected = tile_masses(sums, counts, limits, smooth=smooth, smooth_counts=counts, **settings)
    sums, smooth, counts, limits = (x.cuda() for x in (sums, smooth, counts, limits))
    got = tile_masses(sums, counts, limits, smooth=smooth, smooth_counts=counts, **settings)
    torch.testing.assert_close(got.cpu(), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 96])
def test_key_power_sums_match_their_reference(head_dim, dtype):
    q, k, _ = make_qkv(2, 8, 2, 1000, head_dim, dtype=dtype, structure="mixed")
    ends = torch.arange(1000) // 128 * 128
    arguments = {"scale": head_dim**-0.5, "power": 4.0}
    expected = key_power_sums(q, k, ends, **arguments)
    got = key_power_sums(q.cuda(), k.cuda(), ends.cuda(), **arguments).cpu()
    assert torch.equal(got.isinf(), expected.isinf())
    seen = expected.isfinite()
    torch.testing.assert_close(got[seen], expected[seen], atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("threshold", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("num_tiles", [63, 1000])
def test_pooled_selection_matches_its_reference(num_tiles, threshold):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, num_tiles, 64, generator=generator) for heads in (8, 2))
    arguments = {"scale": 0.3, "threshold": threshold}
    limits, forced = torch.arange(num_tiles), torch.zeros(1, 1, dtype=torch.long)
    _, counts = select_pooled_blocks(
        q, k, candidates=limits, limits=limits, forced=forced, **arguments
    )
    on_gpu = limits.cuda()
    _, ours = select_pooled_blocks(
        q.cuda(), k.cuda(), candidates=on_gpu, limits=on_gpu, forced=forced.cuda(), **arguments
    )
    assert (ours.cpu() - counts).abs().max() <= 1
    assert (ours.cpu() == counts).float().mean() > 0.95


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("stride", "head_dim"), [(8, 128), (16, 64), (8, 80)])
def test_antidiagonal_kernel_matches_its_reference(stride, head_dim, dtype):
    q, k, _ = make_qkv(1, 4, 2, 2500, head_dim, num_queries=1300, dtype=dtype)
    grid = BlockGrid(1300, 2500, 128, 128)
    for limits in (None, grid.past_tiles().sum(-1)):
        arguments = {"stride": stride, "scale": 0.2, "grid": grid, "limits": limits}
        ours = antidiagonal_block_sums(q.cuda(), k.cuda(), **arguments)
        expected = antidiagonal_block_sums(q.float(), k.float(), **arguments)
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("threshold", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("num_tiles", [63, 1000, 4096])
def test_selection_kernel_matches_its_reference(num_tiles, threshold):
    generator = torch.Generator().manual_seed(0)
    tiles = torch.arange(num_tiles)
    logits = torch.randn(1, 2, 40, num_tiles, generator=generator) * 3
    limits = torch.linspace(0, num_tiles, 40).long()
    logits = logits.masked_fill(tiles >= limits[:, None], float("-inf"))
    p = logits.softmax(-1).nan_to_num(0.0)
    arguments = {"threshold": threshold, "candidates": limits, "limits": limits}
    forced = torch.tensor([[0, 3]])
    blocks, counts = select_top_p_blocks(p, forced=forced, **arguments)
    on_gpu = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    ours, our_counts = select_top_p_blocks(p.cuda(), forced=forced.cuda(), **on_gpu)
    # A sum in another order decides otherwise about a block at the threshold, rarely.
    assert (our_counts.cpu() - counts).abs().max() <= 1
    same = our_counts.cpu() == counts
    assert same.float().mean() > 0.95
    width = blocks.shape[-1]
    valid = (torch.arange(width) < counts.unsqueeze(-1)) & same.unsqueeze(-1)
    assert torch.equal(ours.cpu()[..., :width][valid], blocks[valid])


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 500), (500, 500), (130, 500)])
def test_dense_attention_is_aligned_bottom_right(num_queries, num_keys):
    q, k, v = make_qkv(2, 4, 2, num_keys, 64, num_queries=num_queries, dtype=torch.bfloat16)
    mask = causal_mask(num_queries, num_keys)
    out = dense_attention(q.cuda(), k.cuda(), v.cuda(), scale=0.125).cpu()
    assert_within_budget(
        out, eager_attention(q, k, v, mask, 0.125), exact_attention(q, k, v, mask, 0.125)
    )


def test_dense_attention_in_fp32_never_writes_all_logits():
    q, k, v = make_qkv(1, 4, 2, 4096, 32)
    q, k, v = q.cuda(), k.cuda(), v.cuda()
    assert choose_dense_kernel("auto", q, k) == "efficient"
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = dense_attention(q, k, v, scale=0.2)
    assert torch.cuda.max_memory_allocated() - before < 4 * 4096 * 4096  # a quarter of them
    expected = dense_attention(q, k, v, scale=0.2, kernel="math")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["streaming", "streaming-tri"])
def test_positions_past_32767_are_kept(case):
    q, k, v = make_qkv(1, 2, 1, 40000, 32, num_queries=300, structure="mixed")
    method = build(case)
    plan = method.plan(q.cuda(), k.cuda())
    assert torch.equal(plan.block_mask().cpu(), method.plan(q, k).block_mask())
    out = method(q.cuda(), k.cuda(), v.cuda()).cpu()
    torch.testing.assert_close(out, method(q, k, v), rtol=1e-3, atol=1e-3)

"""The Triton kernel on a CUDA device, in the dtypes models use: ``make test-gpu``."""

import pytest
import torch

from pbs import BlockGrid, block_sparse_attention
from pbs.ops.dense import dense_attention
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
@pytest.mark.parametrize("tile", [16, 32, 64, 128])
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


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 500), (500, 500), (130, 500)])
def test_dense_attention_is_aligned_bottom_right(num_queries, num_keys):
    q, k, v = make_qkv(2, 4, 2, num_keys, 64, num_queries=num_queries, dtype=torch.bfloat16)
    mask = causal_mask(num_queries, num_keys)
    out = dense_attention(q.cuda(), k.cuda(), v.cuda(), scale=0.125).cpu()
    assert_within_budget(
        out, eager_attention(q, k, v, mask, 0.125), exact_attention(q, k, v, mask, 0.125)
    )

"""Attention with eight-bit factors: what the emulation loses, and who refuses it."""

import pytest
import torch

from pbs import BlockGrid, block_sparse_attention
from pbs.ops.block_sparse_attention.triton_hopper_launch import hopper_options
from pbs.testing import make_qkv
from tests.ops.attention_truth import exact_attention
from tests.ops.test_block_sparse_attention import random_plan
from tests.ops.test_plan import segment_order


def relative_error(q, k, v, plan, precision):
    """Root mean square of the error over that of the exact output."""
    out = block_sparse_attention(q, k, v, plan, backend="reference", precision=precision)
    assert out.dtype == q.dtype
    exact = exact_attention(q, k, v, plan.token_mask(), q.shape[3] ** -0.5)
    return float((out.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@pytest.mark.parametrize("num_order_heads", [0, 2, 4])
@pytest.mark.parametrize("structure", ["random", "vertical"])
def test_the_error_is_a_few_percent(structure, num_order_heads):
    q, k, v = make_qkv(1, 4, 2, 700, 64, dtype=torch.bfloat16, structure=structure)
    order = segment_order(700, 256)[:1, :1].repeat(1, max(1, num_order_heads), 1)
    order = order if num_order_heads else None
    grid = BlockGrid(700, 700, 128, 128)
    plan = random_plan(1, 4, grid, segment_size=256, order=order)
    given, eight = (relative_error(q, k, v, plan, name) for name in ("as_given", "fp8"))
    assert given < 0.005
    assert 0.01 < eight < 0.06


def test_a_mean_of_the_keys_costs_nothing():
    q, k, v = make_qkv(1, 2, 2, 512, 64)
    plan = random_plan(1, 2, BlockGrid(512, 512, 128, 128))
    moved = k + 30 * torch.randn(1, 2, 1, 64)
    few, many = (relative_error(q, keys, v, plan, "fp8") for keys in (k, moved))
    assert many < 1.2 * few


@pytest.mark.parametrize("backend", ["auto", "cpu", "triton"])
def test_backends_without_eight_bit_products_refuse(backend):
    q, k, v = make_qkv(1, 1, 1, 256, 64)
    plan = random_plan(1, 1, BlockGrid(256, 256, 128, 128))
    with pytest.raises(NotImplementedError, match=r"precision='fp8'.*'reference' emulates"):
        block_sparse_attention(q, k, v, plan, backend=backend, precision="fp8")


def test_an_unknown_precision_is_refused():
    q, k, v = make_qkv(1, 1, 1, 256, 64)
    plan = random_plan(1, 1, BlockGrid(256, 256, 128, 128))
    with pytest.raises(ValueError, match="fp8"):
        block_sparse_attention(q, k, v, plan, precision="fp")


@pytest.mark.parametrize(
    "case",
    [{"capability": (8, 0)}, {"head_dim": 256}, {"head_dim": 72}, {"key_tile": 64}],
    ids=str,
)
def test_what_the_kernel_does_not_run(case):
    shape = {"head_dim": 128, "element_size": 1, "query_tile": 128, "key_tile": 128}
    assert hopper_options(**shape, capability=(9, 0)) is not None
    assert hopper_options(**{"capability": (9, 0), **shape, **case}) is None

"""Every backend against fp64 over exactly the pairs of the plan."""

from dataclasses import replace

import pytest
import torch

from pbs import AttentionPlan, BlockGrid, block_sparse_attention
from pbs.testing import assert_within_budget, make_qkv
from tests.ops.attention_truth import eager_attention, exact_attention
from tests.ops.test_plan import segment_order

BACKENDS = ["reference", "cpu", "triton"]
FP16, FP32, BF16 = torch.float16, torch.float32, torch.bfloat16
# The interpreter gets bf16 wrong: tests/ops/test_gpu.py has the Triton kernel's bf16 cases.
BACKENDS_AND_DTYPES = [
    *((backend, dtype) for backend in BACKENDS for dtype in (FP32, FP16)),
    ("reference", BF16),
    ("cpu", BF16),
]


def random_plan(batch, heads, grid, *, segment_size=0, order=None, density=0.4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, grid.num_query_tiles, grid.num_key_tiles)
    mask = torch.rand(shape, generator=generator) < density
    return AttentionPlan.from_block_mask(mask, grid, segment_size=segment_size, order=order)


def check(q, k, v, plan, backend, scale=None):
    scale = q.shape[3] ** -0.5 if scale is None else scale
    mask = plan.token_mask()
    out = block_sparse_attention(q, k, v, plan, scale=scale, backend=backend)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    assert out.is_contiguous()
    assert_within_budget(
        out, eager_attention(q, k, v, mask, scale), exact_attention(q, k, v, mask, scale)
    )


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "num_queries", "num_keys", "head_dim", "tile"),
    [
        (1, 1, 1, 1, 16, 16),
        (4, 1, 63, 63, 64, 16),
        (4, 2, 200, 200, 64, 32),
        (7, 1, 129, 129, 80, 64),
        (2, 2, 70, 333, 96, 32),
        (2, 1, 130, 259, 128, 128),
        (1, 1, 65, 65, 256, 64),
    ],
)
def test_backend_matches_the_plans_token_mask(
    backend, dtype, heads, kv_heads, num_queries, num_keys, head_dim, tile
):
    q, k, v = make_qkv(2, heads, kv_heads, num_keys, head_dim, num_queries=num_queries, dtype=dtype)
    plan = random_plan(2, heads, BlockGrid(num_queries, num_keys, tile, tile))
    check(q, k, v, plan, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order_heads", [1, 3])
def test_reordered_keys(backend, order_heads):
    q, k, v = make_qkv(2, 3, 1, 150, 32, structure="vertical")
    order = segment_order(150, 48)[:, :order_heads].contiguous()
    plan = random_plan(2, 3, BlockGrid(150, 150, 16, 16), segment_size=48, order=order)
    check(q, k, v, plan, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_and_unaligned_windows(backend):
    grid = BlockGrid(96, 96, 32, 32)
    q, k, v = make_qkv(1, 2, 1, 96, 32)
    plan = AttentionPlan(
        grid,
        1,
        2,
        blocks=torch.zeros(1, 1, 3, 0, dtype=torch.int32),
        num_blocks=torch.zeros(1, 1, 3, dtype=torch.int32),
        windows=torch.tensor([[0, 0, 0], [5, 37, 0], [3, 50, 82]], dtype=torch.int32)[None, None],
        num_windows=torch.tensor([[[1, 2, 3]]], dtype=torch.int32),
        columns=torch.tensor([[[[0] * 4, [0, 2, 0, 0], [0, 1, 36, 40]]]], dtype=torch.int32),
        num_columns=torch.tensor([[[0, 2, 4]]], dtype=torch.int32),
    )
    check(q, k, v, plan, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_local_window_rule(backend):
    grid = BlockGrid(130, 130, 32, 32)
    q, k, v = make_qkv(2, 2, 2, 130, 16)
    starts = torch.arange(5, dtype=torch.int32) * 32
    plan = AttentionPlan(
        grid,
        2,
        2,
        blocks=torch.zeros(1, 1, 5, 0, dtype=torch.int32),
        num_blocks=torch.zeros(1, 1, 5, dtype=torch.int32),
        windows=starts.expand(1, 1, 5, 5),
        num_windows=torch.arange(1, 6, dtype=torch.int32)[None, None],
        local_window=torch.tensor([[3, 20], [10, 1]], dtype=torch.int32),
    )
    visible = plan.token_mask()[0, 0]
    distance = torch.arange(130)[:, None] - torch.arange(130)
    near = (distance < 20) | (torch.arange(130) < 3)
    assert torch.equal(visible, (distance >= 0) & near)
    check(q, k, v, plan, backend)


@pytest.mark.parametrize("head_dim", [64, 80])
def test_kernel_for_chips_without_tensor_memory_accelerator(head_dim, monkeypatch):
    from pbs.ops.block_sparse_attention import triton as kernel

    options = kernel.launch_options(
        head_dim=head_dim, element_size=4, query_tile=32, key_tile=32, capability=(8, 0)
    )
    assert not options.use_tma
    monkeypatch.setattr(kernel, "launch_options", lambda **_: options)
    q, k, v = make_qkv(2, 4, 2, 200, head_dim)
    order = segment_order(200, 64)[:, :1].expand(2, 4, -1)
    plan = random_plan(2, 4, BlockGrid(200, 200, 32, 32), segment_size=64, order=order)
    check(q, k, v, plan, "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_query_without_keys_gives_zero(backend):
    grid = BlockGrid(32, 32, 16, 16)
    q, k, v = make_qkv(1, 1, 1, 32, 16)
    none = torch.zeros(1, 1, 2, 0, dtype=torch.int32)
    zero = torch.zeros(1, 1, 2, dtype=torch.int32)
    plan = AttentionPlan(grid, 1, 1, none, zero, none, zero)
    out = block_sparse_attention(q, k, v, plan, backend=backend)
    assert torch.equal(out, torch.zeros_like(q))


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_may_be_permuted_within_the_whole_sequence(backend):
    q, k, v = make_qkv(1, 2, 2, 64, 16)
    generator = torch.Generator().manual_seed(0)
    query_order = torch.stack([torch.randperm(64, generator=generator) for _ in range(2)])[None]
    starts = torch.arange(4, dtype=torch.int32) * 16
    plan = AttentionPlan(
        BlockGrid(64, 64, 16, 16),
        1,
        2,
        blocks=torch.zeros(1, 1, 4, 0, dtype=torch.int32),
        num_blocks=torch.zeros(1, 1, 4, dtype=torch.int32),
        windows=starts.expand(1, 1, 4, 4),
        num_windows=torch.full((1, 1, 4), 4, dtype=torch.int32),
        query_order=query_order,
    )
    assert torch.equal(plan.token_mask()[0, 0], torch.ones(64, 64, dtype=bool).tril())
    check(q, k, v, plan, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_logits_do_not_overflow(backend):
    q, k, v = make_qkv(1, 2, 1, 100, 32)
    k[:, :, 7] *= 1e4
    plan = random_plan(1, 2, BlockGrid(100, 100, 16, 16))
    check(q, k, v, plan, backend)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_strided_inputs_as_transformers_passes_them(backend):
    q, k, v = make_qkv(2, 4, 2, 100, 32)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    v = v.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.randn(*k.shape[:3], 64)
    wide[..., :32] = k
    plan = random_plan(2, 4, BlockGrid(100, 100, 16, 16))
    check(q, wide[..., :32], v, plan, backend)
    check(q, k.transpose(2, 3).contiguous().transpose(2, 3), v, plan, backend)


def test_wrong_use_is_refused_with_the_reason():
    q, k, v = make_qkv(1, 2, 1, 64, 16)
    plan = random_plan(1, 2, BlockGrid(64, 64, 16, 16))
    with pytest.raises(ValueError, match="the plan is for"):
        block_sparse_attention(q[:, :1], k, v, plan)
    with pytest.raises(ValueError, match="the plan is for"):
        block_sparse_attention(q[:, :, :60], k, v, plan)
    with pytest.raises(ValueError, match="unknown backend 'cuda'; valid: auto, reference"):
        block_sparse_attention(q, k, v, plan, backend="cuda")
    with pytest.raises(ValueError, match="the plan lies on"):
        block_sparse_attention(q.to("meta"), k.to("meta"), v.to("meta"), plan)
    bf16 = [x.bfloat16() for x in (q, k, v)]
    with pytest.raises(NotImplementedError, match="bf16"):
        block_sparse_attention(*bf16, plan, backend="triton")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q, k, v: (q[0], k, v), ValueError, "four dimensions"),
        (lambda q, k, v: (q[:, :, :0], k, v), ValueError, "q is empty"),
        (lambda q, k, v: (q, k.to("meta"), v), ValueError, "one device"),
        (lambda q, k, v: (q, k.half(), v), TypeError, "one dtype"),
        (lambda q, k, v: (q.int(), k, v), TypeError, "expected q in"),
        (lambda q, k, v: (q, k.repeat(2, 1, 1, 1), v), ValueError, "one batch size"),
        (lambda q, k, v: (q, k[..., :8], v), ValueError, "one head dim"),
        (lambda q, k, v: (q, k, v[:, :, :5]), ValueError, "shaped like k"),
        (lambda q, k, v: (q[:, :3], k, v), ValueError, "must be a multiple of the key heads"),
        (lambda q, k, v: (q, k[:, :, :9], v[:, :, :9]), ValueError, "more queries than keys"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, error, message):
    q, k, v = make_qkv(1, 4, 2, 64, 16)
    plan = random_plan(1, 4, BlockGrid(64, 64, 16, 16))
    with pytest.raises(error, match=message):
        block_sparse_attention(*change(q, k, v), plan)


def test_triton_on_a_cpu_without_the_interpreter_says_what_to_do(monkeypatch):
    import triton

    q, k, v = make_qkv(1, 1, 1, 32, 16)
    plan = random_plan(1, 1, BlockGrid(32, 32, 16, 16))
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(NotImplementedError, match="TRITON_INTERPRET=1"):
        block_sparse_attention(q, k, v, plan, backend="triton")


def test_empty_row_lists_are_allowed_anywhere():
    q, k, v = make_qkv(1, 2, 1, 64, 16)
    plan = random_plan(1, 2, BlockGrid(64, 64, 16, 16), density=0.0)
    assert plan.blocks.shape[-1] == 0
    for backend in BACKENDS:
        check(q, k, v, replace(plan), backend)


def test_the_hopper_kernel_is_refused_where_it_cannot_run():
    q, k, v = make_qkv(1, 2, 1, 200, 64, dtype=torch.float16)
    plan = random_plan(1, 2, BlockGrid(200, 200, 128, 128))
    with pytest.raises(NotImplementedError, match="backend 'hopper' needs a Hopper GPU"):
        block_sparse_attention(q, k, v, plan, backend="hopper")

"""What ``make kernels`` compiles: every launch that methods make, by label.

A new kernel needs one entry in :func:`cases`: a call of its public launcher with small tensors. The
report finds the kernels of ``pbs.ops`` by itself and names those that no entry reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pkgutil import walk_packages
from types import ModuleType
from typing import Any

import torch
from triton.runtime.jit import JITFunction

Case = Callable[[], object]

HEAD_DIMS = (64, 80, 96, 128, 256)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NUM_TOKENS = 600


def kernel_modules() -> list[ModuleType]:
    """The modules of ``pbs.ops`` that hold Triton code."""
    import pbs.ops

    names = [entry.name for entry in walk_packages(pbs.ops.__path__, "pbs.ops.")]
    modules = [import_module(name) for name in names]
    return [module for module in modules if any(_functions(module))]


def kernel_names() -> set[str]:
    """Kernels by name: jitted functions called ``..._kernel...``; others are parts of kernels."""
    return {
        function.__name__
        for module in kernel_modules()
        for function in _functions(module)
        if "_kernel" in function.__name__ and function.__module__ == module.__name__
    }


def _functions(module: ModuleType) -> Iterator[Any]:
    """Jitted functions of a module; an autotuned one lies inside its tuner."""
    for value in vars(module).values():
        inner = getattr(value, "fn", value)
        for function in (value, inner):
            if isinstance(function, JITFunction):
                yield function
                break


def cases() -> dict[str, Case]:
    """Label to a call of a public launcher, which reaches one or more kernels."""
    return {**_attention(), **_order_and_gather(), **_antidiagonal(), **_selection()}


def _attention() -> dict[str, Case]:
    """Head dims and dtypes, block sizes, and what plans may hold besides whole tiles."""
    found: dict[str, Case] = {}
    for dtype in ("bf16", "fp16"):
        for head_dim in HEAD_DIMS:
            found[f"attention {dtype} D={head_dim} B=128"] = partial(
                _attend, "pbs", head_dim, dtype
            )
    for size in (32, 64):
        found[f"attention bf16 D=128 B={size}"] = partial(
            _attend, "pbs", 128, "bf16", block_size=size, segment_size=256
        )
    found["attention bf16 D=128 columns"] = partial(
        _attend, "minference", 128, "bf16", vertical_size=30, slash_size=100
    )
    found["attention bf16 D=128 local window"] = partial(
        _attend, "streaming", 128, "bf16", n_init=64, n_local=256
    )
    for head_dim in (64, 128):
        found[f"attention bf16 D={head_dim} triton"] = partial(
            _attend, "pbs", head_dim, "bf16", uses_hopper=False
        )
    for head_dim in (64, 80, 128):
        found[f"attention fp8 D={head_dim} B=128"] = partial(
            _attend, "pbs", head_dim, "bf16", precision="fp8"
        )
    found["attention fp32 D=128 B=128"] = partial(_attend, "pbs", 128, "fp32")
    return found


def _attend(
    method: str,
    head_dim: int,
    dtype: str,
    *,
    uses_hopper: bool | None = None,
    precision: str = "as_given",
    **params: Any,
) -> object:
    from pbs import build_method
    from pbs.ops.block_sparse_attention.triton import block_sparse_attention

    q, k = _tensor(head_dim, dtype), _tensor(head_dim, dtype, heads=1)
    plan = build_method(method, **params).plan(q, k)
    return block_sparse_attention(
        q, k, k, plan, scale=1.0, uses_hopper=uses_hopper, precision=precision
    )


def _order_and_gather() -> dict[str, Case]:
    from pbs.ops.permutation import triton as permutation
    from pbs.ops.pooling import triton as pooling
    from pbs.ops.quantisation import triton as quantisation

    found: dict[str, Case] = {}
    order = torch.arange(NUM_TOKENS).expand(1, 4, -1)
    for head_dim in (64, 128, 256):
        k = _tensor(head_dim, "bf16")
        proxy, name = k[:, :, -128:], f"bf16 D={head_dim}"
        found[f"key importance {name}"] = partial(permutation.key_importance, proxy, k, scale=1.0)
        found[f"key importance {name} of means"] = partial(
            permutation.key_importance, proxy.float(), k, scale=1.0
        )
        found[f"segment order {name} S=256"] = partial(
            permutation.importance_order, proxy, k, scale=1.0, segment_size=256
        )
        found[f"gather {name}"] = partial(permutation.gather_keys, k, order)
        found[f"gather and pool {name}"] = partial(
            permutation.gather_and_pool, k, order, tile=128, pad_mean="real"
        )
        for place, moved in (("", None), (" moved", order)):
            settings = {"tile": 128, "order": moved}
            found[f"quantise fp8 D={head_dim}{place}"] = partial(
                quantisation.quantise_rows, k, **settings, shift=k[:, :, 0].float(), rotated=True
            )
            found[f"quantise values fp8 D={head_dim}{place}"] = partial(
                quantisation.quantise_values, k, k[:, :, 0].float(), **settings
            )
        found[f"pool {name}"] = partial(pooling.mean_pool, k, 128, pad_mean="real")
    for segment in (256, 2048):
        found[f"sort S={segment}"] = partial(
            permutation.sort_segments,
            torch.rand(1, 4, 4096),
            num_keys=4096,
            segment_size=segment,
        )
    return found


def _antidiagonal() -> dict[str, Case]:
    from pbs import BlockGrid
    from pbs.ops.antidiagonal import antidiagonal_block_sums

    grid = BlockGrid(NUM_TOKENS, NUM_TOKENS, 128, 128)
    found: dict[str, Case] = {}
    for head_dim, stride in ((128, 8), (128, 16), (64, 8)):
        x = _tensor(head_dim, "bf16")
        found[f"antidiagonal bf16 D={head_dim} s={stride}"] = partial(
            antidiagonal_block_sums, x, x, stride=stride, scale=1.0, grid=grid, backend="triton"
        )
    from pbs.ops.tile_logsumexp import tile_logsumexp

    bounds = torch.zeros(4, NUM_TOKENS, dtype=torch.int32)
    sizes = (("bf16", 128, 128), ("bf16", 64, 128), ("bf16", 128, 8), ("fp32", 128, 8))
    for dtype, head_dim, tile in sizes:
        x = _tensor(head_dim, dtype)
        found[f"tile log-sums {dtype} D={head_dim} T={tile}"] = partial(
            tile_logsumexp,
            *(x, x, bounds),
            tile=tile,
            scale=1.0,
            natural=x,
            until=bounds,
            backend="triton",
        )
    from pbs.ops.slash_windows import columns_outside, walk_windows

    table, tiles = torch.zeros(4, NUM_TOKENS + 127, dtype=torch.int64), NUM_TOKENS // 64
    ends = torch.zeros(tiles, dtype=torch.int64)
    found["slash windows"] = partial(
        walk_windows, table, ends, width=64, num_keys=NUM_TOKENS, backend="triton"
    )
    lists, counts = torch.zeros(4, tiles, 99, dtype=torch.int32), torch.zeros(4, tiles).int()
    found["columns outside windows"] = partial(
        columns_outside,
        *(lists[:, 0], counts[:, 0], lists, counts, ends),
        width=64,
        backend="triton",
    )
    from pbs.ops.last_query_scores import last_query_scores

    for dtype, head_dim in (("bf16", 128), ("bf16", 64), ("fp32", 128)):
        x = _tensor(head_dim, dtype)
        found[f"last query scores {dtype} D={head_dim}"] = partial(
            last_query_scores, x, x, scale=1.0, last_q=128, backend="triton"
        )
    from pbs.ops.largest_within import largest_within

    found["largest within"] = partial(
        largest_within, torch.zeros(4, NUM_TOKENS), 0.9, backend="triton"
    )
    from pbs.ops.tile_masses import tile_masses

    tiles = NUM_TOKENS // 128
    sums, counts = torch.zeros(1, 4, tiles, 8, tiles), torch.ones(tiles, dtype=torch.int32)
    found["tile masses"] = partial(
        tile_masses,
        *(sums, counts, counts),
        power=4.0,
        smooth=sums,
        smooth_counts=counts,
        share=0.5,
        backend="triton",
    )
    from pbs.ops.key_power_sums import key_power_sums

    ends = torch.zeros(NUM_TOKENS, dtype=torch.int32)
    for dtype, head_dim in (("bf16", 128), ("bf16", 64), ("fp32", 128)):
        x = _tensor(head_dim, dtype)
        found[f"key power sums {dtype} D={head_dim}"] = partial(
            key_power_sums, x, x, ends, scale=1.0, power=4.0, backend="triton"
        )
    x, head_dim = _tensor(64, "bf16"), 64
    beside = torch.zeros(1, 4, grid.num_query_tiles * 128 // stride)
    found[f"antidiagonal bf16 D={head_dim} s={stride} credited"] = partial(
        antidiagonal_block_sums,
        x,
        x,
        stride=stride,
        scale=1.0,
        grid=grid,
        limits=grid.past_tiles().sum(dim=-1),
        beside=beside,
        backend="triton",
    )
    return found


def _selection() -> dict[str, Case]:
    from pbs.ops.block_selection import triton as selection

    found: dict[str, Case] = {}
    for num_tiles in (1024, 4096):
        limits = torch.tensor([num_tiles])
        bounds = {"threshold": 0.9, "candidates": limits, "limits": limits, "forced": None}
        found[f"top-p T={num_tiles}"] = partial(
            selection.select_top_p_blocks, torch.rand(1, 1, 1, num_tiles), **bounds, covered=None
        )
        found[f"top-p T={num_tiles} credited"] = partial(
            selection.select_top_p_blocks,
            torch.rand(1, 1, 1, num_tiles),
            **{**bounds, "forced": torch.zeros(1, 1, dtype=torch.int64)},
            covered=torch.rand(1, 1, 1),
        )
        found[f"pooled top-p T={num_tiles}"] = partial(
            selection.select_pooled_blocks,
            torch.rand(1, 4, 1, 128),
            torch.rand(1, 1, num_tiles, 128),
            scale=1.0,
            grid=None,
            **bounds,
        )
        found[f"lists T={num_tiles}"] = partial(
            selection.list_blocks, torch.ones(1, 1, 2, num_tiles, dtype=torch.bool)
        )
    return found


def _tensor(head_dim: int, dtype: str, *, heads: int = 4) -> torch.Tensor:
    return torch.randn(1, heads, NUM_TOKENS, head_dim).to(DTYPES[dtype])

"""Counts against the figures of the design notes and of the architecture's own numbers."""

import pytest

from experiments.timing.cost_model import (
    DENSE_H100,
    H100,
    Rates,
    Shape,
    attention_memory,
    block_score_bytes,
    dense_flops,
    floor_ms,
    known_rates,
    method_cost,
)
from experiments.timing.length_plan import lengths_that_fit
from experiments.timing.model_cost import Architecture, model_memory
from experiments.timing.published import DENSITIES, TABLE7, density_at

LLAMA = Shape(32, 8, 128)
LLAMA_8B = Architecture(4096, 32, 14336, 128256, LLAMA)
N = 128 * 1024


def test_calibrated_selection_stays_within_a_twentieth_of_dense_attention_at_128k():
    stages = method_cost("pbs_calibrated", LLAMA, N, density=0.2)
    extra = stages["order"].flops + stages["selection"].flops
    assert extra <= 0.05 * dense_flops(LLAMA, N)


def test_dense_attention_at_128k():
    assert dense_flops(LLAMA, N) == pytest.approx(1.41e14, rel=0.01)
    assert floor_ms(method_cost("flash", LLAMA, N), DENSE_H100) == pytest.approx(235, rel=0.01)


@pytest.mark.parametrize(("rates", "expected"), [(DENSE_H100, 51), (H100, 39)])
def test_pbs_attention_at_the_papers_density(rates, expected):
    work = method_cost("pbs", LLAMA, N, density=0.219)["attention"]
    assert work.flops == pytest.approx(3.1e13, rel=0.01)
    assert work.floor_ms(rates) == pytest.approx(expected, rel=0.02)


# The notes round up what an implementation moves; the floor counts each tensor once.
@pytest.mark.parametrize(
    ("shared", "gigabytes", "milliseconds"), [(True, 3.5, 1.2), (False, 8.0, 2.7)]
)
def test_bytes_of_order_gather_and_pooling(shared, gigabytes, milliseconds):
    stages = method_cost("pbs", LLAMA, N, density=0.219, shared_order=shared)
    overhead = {name: work for name, work in stages.items() if name != "attention"}
    moved = sum(work.num_bytes for work in overhead.values())
    assert 0.85 * gigabytes < moved / 1e9 < gigabytes
    assert 0.75 * milliseconds < floor_ms(overhead, DENSE_H100) < milliseconds


def test_block_scores_at_128k():
    assert block_score_bytes(LLAMA, N) / 1e9 == pytest.approx(0.13, abs=0.005)


def test_the_published_kernel_rate_follows_from_table_7():
    row = next(row for row in TABLE7 if row.length == N)
    rate = DENSITIES[N] * dense_flops(LLAMA, N) / row.attention_ms / 1e9
    assert rate == pytest.approx(205, rel=0.01)


def test_published_rows_add_up():
    for row in TABLE7:
        parts = row.permute_ms + row.select_ms + row.attention_ms
        assert parts == pytest.approx(row.total_ms, abs=0.02)
    assert TABLE7[4].speed_up == pytest.approx(2.77, abs=0.005)


def test_densities_say_whether_they_are_published():
    assert density_at(8192) == (pytest.approx(0.579, abs=0.001), True)
    assert density_at(N) == (pytest.approx(0.219, abs=0.001), True)
    assert density_at(4 * N) == (DENSITIES[N], False)
    assert density_at(1024) == (DENSITIES[8192], False)


def test_a_shared_order_moves_less_and_costs_the_same_attention():
    own = method_cost("pbs", LLAMA, N, density=0.2)
    shared = method_cost("pbs", LLAMA, N, density=0.2, shared_order=True)
    assert shared["gather"].num_bytes * 4 == own["gather"].num_bytes
    assert shared["attention"] == own["attention"]


def test_every_method_has_a_count():
    from pbs.methods import METHODS

    for name in METHODS.names:
        stages = method_cost(name, LLAMA, N, density=0.2)
        assert stages["attention"].flops > 0
    with pytest.raises(ValueError, match="unknown method 'telepathy'"):
        method_cost("telepathy", LLAMA, N)


def test_the_architecture_has_eight_billion_weights():
    assert LLAMA_8B.num_parameters == pytest.approx(8.03e9, rel=0.001)


def test_lengths_that_do_not_fit_are_planned():
    memory = 80e9 * 0.9
    lengths = [2**n * 1024 for n in range(3, 10)]
    fit = lengths_that_fit(lengths, memory, lambda n: model_memory(LLAMA_8B, n))
    assert fit == [8192, 16384, 32768, 65536, 131072]
    one_layer = lengths_that_fit(
        lengths, memory, lambda n: attention_memory("pbs", LLAMA, n, density=0.22)
    )
    assert one_layer == lengths


def test_extra_memory_at_128k_with_a_shared_order():
    sizes = attention_memory("pbs", LLAMA, N, density=0.219, shared_order=True)
    extra = sum(sizes.values()) - sizes["q, k, v, out"]
    assert 0.5 < extra / 2**30 < 0.8


def test_shapes_are_read_and_refused():
    assert Shape.parse("32/8/128") == LLAMA
    assert str(LLAMA) == "32/8/128"
    with pytest.raises(ValueError, match="Hq/Hkv/D"):
        Shape.parse("32x8x128")
    with pytest.raises(ValueError, match="multiple of kv_heads"):
        Shape.parse("6/4/64")


def test_rates_are_known_by_the_gpus_name():
    assert known_rates("NVIDIA H100 80GB HBM3") is H100
    assert known_rates("abacus") is None
    assert Rates("x", 1e12, 1e12).flops == 1e12

"""Timing: interleaving, failures as results, stages, memory, exact rows, exact densities."""

import time
from pathlib import Path

import pytest
import torch

from experiments.gate.rows import check_rows
from experiments.memory import (
    is_out_of_memory,
    peak_memory,
    poisoned_memory,
)
from experiments.report.times import Times, break_even_table, timing_table
from experiments.timing import attention_timing
from experiments.timing.attention_timing import measure_cell
from experiments.timing.cost_model import Rates, Shape
from experiments.timing.dense_kernels import dense_backend, dense_kernels
from experiments.timing.densities import ControlledDensity
from experiments.timing.inputs import Cell, draw_inputs
from experiments.timing.stopwatch import (
    Effort,
    Failure,
    Timing,
    measure_rates,
    run_in_stages,
    time_interleaved,
)
from experiments.timing.timing_report import (
    break_even,
    break_evens,
    summarise_times,
    table_rows,
)
from experiments.tools import profile_call
from pbs import build_method
from pbs.ops.block_sparse_attention import block_sparse_attention
from pbs.ops.stages import StageTimer, stage
from pbs.testing import make_qkv

CPU = torch.device("cpu")
RATES = Rates("made up", 1e11, 1e10)
ONCE = Effort(0.001, 1, 1)


def small_cell(length=700, density=None, structure="mixed", shape="4/2/32"):
    heads = Shape.parse(shape, element_size=4)
    return Cell(heads, length, torch.float32, CPU, structure, density)


# stages


def test_a_stage_costs_nothing_and_records_nothing_without_a_timer():
    with stage("order"), stage("order"):
        pass


def test_nested_stages_count_for_the_inner_one():
    started = time.perf_counter()
    with StageTimer("cpu") as timer:
        with stage("outer"):
            time.sleep(0.01)
            with stage("inner"):
                time.sleep(0.03)
        time.sleep(0.02)
        with stage("outer"):
            time.sleep(0.01)
    found = timer.milliseconds()
    assert set(found) == {"outer", "inner"}
    assert found["outer"] >= 19
    assert found["inner"] >= 29
    assert sum(found.values()) <= 1e3 * (time.perf_counter() - started) - 19


def test_the_stages_of_a_call_make_up_its_time():
    q, k, v = make_qkv(1, 4, 2, 1500, 32, structure="mixed")
    method = build_method("pbs", threshold=0.5)
    started = time.perf_counter()
    found = run_in_stages(method, q, k, v, scale=0.2)
    elapsed = 1e3 * (time.perf_counter() - started)
    assert {"order", "selection", "gather", "attention"} <= set(found)
    assert 0.5 * elapsed < sum(found.values()) <= elapsed
    assert method.recorder is None


# time_interleaved


def test_variants_take_turns():
    calls = []
    variants = {name: lambda index, name=name: calls.append((name, index)) for name in "ab"}
    found = time_interleaved(variants, device=CPU, effort=Effort(1.0, 2, 2))
    warm_up, rounds = calls[:-4], calls[-4:]
    assert rounds == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert warm_up == sorted(warm_up)
    assert all(len(result.samples_ms) == 2 for result in found.values())


def test_running_out_of_memory_is_a_result_and_the_others_go_on():
    def explode(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    variants = {"big": explode, "small": lambda _: None}
    found = time_interleaved(variants, device=CPU, effort=Effort(0.01, 3, 3))
    assert found["big"].kind == "out of memory"
    assert found["big"].to_dict()["median_ms"] is None
    assert len(found["small"].samples_ms) == 3


def test_other_errors_are_not_swallowed():
    def explode(_):
        raise RuntimeError("illegal instruction")

    with pytest.raises(RuntimeError, match="illegal"):
        time_interleaved({"a": explode}, device=CPU, effort=ONCE)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("no kernel image"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_recognised(error, expected):
    assert is_out_of_memory(error) is expected


def test_a_timing_keeps_every_sample():
    found = Timing((3.0, 1.0, 2.0, 5.0, 0.0)).to_dict()
    assert found["median_ms"] == 2.0
    assert found["samples_ms"] == [3.0, 1.0, 2.0, 5.0, 0.0]
    assert found["p20_ms"] < 2 < found["p80_ms"]


def test_impossible_efforts_are_refused():
    with pytest.raises(ValueError, match="min_rounds"):
        Effort(1.0, 5, 2)


# memory


def test_peak_memory_sees_what_was_freed():
    with peak_memory("cpu") as peak:
        torch.ones(16 << 20).sum()
    if peak.num_bytes is None:
        pytest.skip("the system does not tell")
    assert 60 << 20 < peak.num_bytes < 110 << 20


def test_poison_reaches_torch_empty_and_ends():
    torch.utils.deterministic.fill_uninitialized_memory = False
    with poisoned_memory("cpu", 0):
        assert torch.empty(1000).isnan().all()
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_rates_of_a_cpu_are_measured():
    rates = measure_rates("cpu", torch.float32)
    assert rates.flops > 1e8
    assert rates.bandwidth > 1e7


# exact rows


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("pbs", {"threshold": 0.5}),
        ("pbs", {"target": "keys_then_queries", "threshold": 0.5}),
        ("minference", {"vertical_size": 30, "slash_size": 100}),
        ("streaming", {"n_init": 32, "n_local": 200}),
    ],
    ids=["pbs", "queries", "columns", "token-rule"],
)
def test_exact_rows_agree_with_the_reference(method, params):
    q, k, v = make_qkv(2, 4, 2, 700, 32, structure="mixed")
    plan = build_method(method, **params).plan(q, k)
    assert not plan.is_dense
    out = block_sparse_attention(q, k, v, plan, scale=0.2, backend="reference")
    found = check_rows(out, q, k, v, plan, scale=0.2, num_rows=24)
    assert found.passed, str(found)
    assert found.relative < 1e-5
    assert found.num_rows == 2 * 4 * 24


def test_a_tile_left_out_fails_and_so_does_an_unwritten_output():
    q, k, v = make_qkv(1, 2, 1, 1500, 32)
    method = build_method("pbs", threshold=0.9)
    plan = method.plan(q, k)
    out = method(q, k, v)
    scale = 32**-0.5
    assert check_rows(out, q, k, v, plan, scale=scale).passed
    fewer = build_method("pbs", threshold=0.85)(q, k, v)
    assert not check_rows(fewer, q, k, v, plan, scale=scale).passed
    holed = out.clone()
    holed[0, 1, 77, 3] = float("nan")
    found = check_rows(holed, q, k, v, plan, scale=scale)
    assert found.num_bad == 1
    assert not found.passed


def test_eight_bits_are_allowed_the_error_of_their_emulation_and_a_tile_left_out_is_not():
    q, k, v = make_qkv(1, 2, 1, 1500, 32, structure="mixed")
    settings = {"backend": "reference", "precision": "fp8"}
    method = build_method("pbs", threshold=0.9, **settings)
    plan = method.plan(q, k)
    assert not plan.is_dense
    out, scale = method(q, k, v), 32**-0.5
    found = check_rows(out, q, k, v, plan, scale=scale, precision="fp8")
    assert found.passed, str(found)
    assert not check_rows(out, q, k, v, plan, scale=scale).passed
    fewer = build_method("pbs", threshold=0.3, **settings)(q, k, v)
    assert not check_rows(fewer, q, k, v, plan, scale=scale, precision="fp8").passed


# exact density


def test_a_set_density_changes_nothing_else():
    own = build_method("pbs", backend="reference", precision="fp8")
    q, k, v = make_qkv(1, 2, 1, 900, 32, structure="mixed")
    found = ControlledDensity(method=own, target_density=1.0)(q, k, v)
    expected = build_method("pbs", backend="reference", precision="fp8", threshold=1.0)(q, k, v)
    torch.testing.assert_close(found, expected)


def test_a_density_can_be_set_where_heads_choose_in_their_own_segment():
    q, k, v = make_qkv(1, 4, 2, 5000, 32, structure="mixed")
    own = build_method("pbs_calibrated")
    assert own.plan(q, k).windows.shape[1] == 4
    method = ControlledDensity(method=own, target_density=0.3)
    plan = method.plan(q, k)
    plan.validate()
    assert float((plan.density() - 0.3).abs().max()) <= 0.5 / plan.grid.num_causal_tiles + 1e-6
    assert torch.equal(plan.order, own.plan(q, k).order)
    assert check_rows(method(q, k, v), q, k, v, plan, scale=32**-0.5).passed
    assert not plan.token_mask().triu(1).any()


@pytest.mark.parametrize("gqa", ["per_query_head", "shared"])
@pytest.mark.parametrize("density", [0.3, 0.45, 0.8])
def test_density_is_met_to_the_nearest_tile(gqa, density):
    q, k, v = make_qkv(1, 4, 2, 3000, 32)
    own = build_method("pbs", gqa=gqa)
    method = ControlledDensity(method=own, target_density=density)
    plan = method.plan(q, k)
    plan.validate()
    assert float((plan.density() - density).abs().max()) <= 0.5 / plan.grid.num_causal_tiles + 1e-6
    assert torch.equal(plan.order, own.plan(q, k).order)
    has_earlier = plan.num_blocks[0] > 0
    assert (plan.blocks[0, :, :, 0][has_earlier] == 0).all()
    assert check_rows(method(q, k, v), q, k, v, plan, scale=32**-0.5).passed


def test_full_density_is_dense_attention():
    q, k, v = make_qkv(1, 2, 1, 900, 32)
    found = ControlledDensity(method=build_method("meanpool"), target_density=1.0)(q, k, v)
    assert torch.allclose(found, build_method("flash")(q, k, v), atol=1e-5)


def test_a_density_below_the_windows_is_refused():
    q, k, _ = make_qkv(1, 2, 1, 900, 32)
    method = ControlledDensity(method=build_method("pbs"), target_density=0.05)
    with pytest.raises(ValueError, match="windows alone"):
        method.plan(q, k)


def test_methods_of_single_columns_have_no_controlled_density():
    q, k, _ = make_qkv(1, 2, 1, 900, 32)
    inner = build_method("minference", vertical_size=30, slash_size=100)
    with pytest.raises(NotImplementedError, match="whole tiles"):
        ControlledDensity(method=inner, target_density=0.5).plan(q, k)


def test_a_dense_plan_stays_dense():
    q, k, _ = make_qkv(1, 2, 1, 200, 32)
    method = ControlledDensity(method=build_method("pbs"), target_density=0.5)
    assert method.plan(q, k).is_dense


# cells


def test_a_cell_has_everything_beside_its_time():
    methods = {"pbs": build_method("pbs"), "flash": build_method("flash")}
    record = measure_cell(
        small_cell(density=0.6), methods, dense_kernels("cpu"), effort=ONCE, rates=RATES
    )
    dense, pbs = record["dense"]["cpu"], record["methods"]["pbs"]
    assert dense["median_ms"] > 0
    assert dense["error"] <= dense["allowed_error"]
    assert dense["is_fastest"]
    assert pbs["density"] == pytest.approx(0.6, abs=0.04)
    assert 0 < pbs["coverage"] < 1
    assert pbs["error"] <= pbs["allowed_error"]
    assert pbs["speed_up"]["cpu"] == pytest.approx(dense["median_ms"] / pbs["median_ms"])
    assert pbs["floor_ms"] == pytest.approx(sum(pbs["stage_floors_ms"].values()))
    assert set(pbs["stages_ms"]) >= {"order", "selection", "gather", "attention"}
    assert len(pbs["samples_ms"]) >= 1
    assert record["methods"]["flash"]["dense_reason"].startswith("dense method")


def test_no_time_for_a_wrong_kernel(monkeypatch):
    def wrong(q, k, v, *, scale):
        return dense_kernels("cpu")["cpu"](q, k, v, scale=scale) * 1.05

    record = measure_cell(small_cell(), {}, {"wrong": wrong}, effort=ONCE)
    assert record["dense"]["wrong"]["failure"] == "incorrect"
    assert record["dense"]["wrong"]["median_ms"] is None
    assert record["fastest_dense"] is None


def test_what_fails_in_a_cell_is_recorded_and_the_rest_is_timed(monkeypatch):
    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def no_kernel(*_, **__):
        raise RuntimeError("No available kernel. Aborting execution.")

    method = build_method("minference", vertical_size=30, slash_size=100)
    kernels = {"big": no_memory, "absent": no_kernel, **dense_kernels("cpu")}
    record = measure_cell(small_cell(density=0.7), {"minference": method}, kernels, effort=ONCE)
    assert record["dense"]["big"]["failure"] == "out of memory"
    assert record["dense"]["absent"]["failure"] == "unavailable"
    assert record["methods"]["minference"]["failure"] == "unavailable"
    assert record["fastest_dense"] == "cpu"
    assert len(table_rows(record)) == 4
    shown = timing_table(Times("cell", "cpu", (record,)))
    assert "out of memory" in shown["ms"].tolist()


def test_inputs_that_do_not_fit_are_recorded(monkeypatch):
    def no_memory(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr("experiments.timing.inputs.draw_inputs", no_memory)
    record = measure_cell(small_cell(), {}, dense_kernels("cpu"), effort=ONCE)
    assert record["failure"]["failure"] == "out of memory"
    assert table_rows(record)[0]["median_ms"] is None
    assert summarise_times([record])["cells"][0]["prefill_seconds"] is None


@pytest.mark.parametrize("structure", ["random", "vertical", "mixed"])
def test_turned_groups_have_the_attention_of_the_drawn_one(monkeypatch, structure):
    monkeypatch.setattr("experiments.timing.inputs.MAX_DRAWN", 0)
    first, second = draw_inputs(small_cell(structure=structure), num_sets=2)
    q, k, _ = first
    assert q.shape == (1, 4, 700, 32)
    assert not torch.equal(q, second[0])
    if structure == "random":
        return
    logits = (q.unflatten(1, (2, 2)) @ k.unsqueeze(2).transpose(-1, -2))[0]
    assert not torch.equal(q[0, :2], q[0, 2:])
    assert torch.allclose(logits[0], logits[1], atol=1e-3)


def test_unknown_dense_kernels_are_refused():
    with pytest.raises(ValueError, match="Valid: cpu"):
        dense_kernels("cpu", ["cudnn"])
    with pytest.raises(ValueError, match="SDPA kernel"):
        dense_backend("fa9")
    with dense_backend("cpu"):
        pass


# break-even


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(1024, 0.5), (4096, 2.0)], 2048),
        ([(1024, 0.9), (2048, 1.0)], 2048),
        ([(4096, 1.5), (1024, 1.1)], 1024),
        ([(1024, 0.5), (2048, 0.9)], None),
        ([(1024, 2.0), (2048, 0.5), (4096, 2.0)], 2**11.5),
        ([], None),
    ],
)
def test_break_even_is_where_the_speed_up_crosses_one(points, expected):
    found = break_even(points)
    assert found == (None if expected is None else pytest.approx(expected))


def made_up(length, speed_up, density=None):
    entry = {
        "median_ms": 10.0,
        "p20_ms": 9.0,
        "p80_ms": 11.0,
        "samples_ms": [10.0],
        "density": 0.3,
        "dense_reason": "",
        "speed_up": {"cpu": speed_up},
        "speed_up_over_fastest": speed_up,
    }
    dense = {"median_ms": 10 * speed_up, "p20_ms": 9.0, "p80_ms": 11.0, "samples_ms": [1.0]}
    return {
        "length": length,
        "q_heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "dtype": "bfloat16",
        "target_density": density,
        "dense": {"cpu": dense},
        "methods": {"pbs": entry},
    }


def test_the_summary_has_the_break_even_and_a_time_per_length():
    records = [made_up(8192, 0.5, 0.5), made_up(32768, 2.0, 0.4)]
    found = summarise_times(records)
    assert found["total"]["break_even"] == pytest.approx(16384)
    assert found["by_length"]["32768"]["prefill_seconds"] == 0.01
    assert found["cells"][0]["dense_cpu_ms"] == 5.0
    points = break_even_table(Times("cells", "cpu", tuple(records)))
    assert points.set_index("over dense").loc["cpu", "break-even, tokens"] == "16384"


def test_densities_at_one_length_have_break_evens_of_their_own():
    records = [made_up(n, s, d) for n, s, d in [(8, 0.5, 0.2), (32, 2.0, 0.2), (8, 0.9, 0.4)]]
    found = {(p["target_density"], p["dense"]): p["break_even"] for p in break_evens(records)}
    assert found[0.2, "cpu"] == pytest.approx(16)
    assert found[0.4, "cpu"] is None


def test_a_failure_names_its_kind():
    assert Failure.of(RuntimeError("first\nsecond"), "error").message == "first"


def test_the_time_of_a_compiler_is_not_taken_for_that_of_a_round(monkeypatch):
    original, calls = attention_timing._call_once, []

    def compiles_at_first(*arguments, **options):
        out, elapsed, peak, _ = original(*arguments, **options)
        calls.append(elapsed)
        return (out, 1e6, peak, True) if len(calls) == 1 else (out, elapsed, peak, False)

    monkeypatch.setattr(attention_timing, "_call_once", compiles_at_first)
    effort = Effort(60.0, 2, 4)
    kernels = {"cpu": dense_kernels(CPU)["cpu"]}
    record = measure_cell(small_cell(100), {}, kernels, effort=effort, num_input_sets=1)
    assert len(record["dense"]["cpu"]["samples_ms"]) == 4
    assert record["dense"]["cpu"]["num_wall_samples"] == 4
    assert 0 <= record["load"] <= 1 or not Path("/proc/stat").exists()


def test_the_profiled_call_runs():
    profile_call.main(["--device", "cpu", "--length", "1024", "--shape", "4/2/32"])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            profile_call.main([])

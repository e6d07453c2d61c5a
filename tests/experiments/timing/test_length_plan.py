"""What a prefill costs and holds, which lengths fit, and that what cannot fit is not tried."""

from types import SimpleNamespace

import pytest
import torch

from experiments.memory import device_bytes
from experiments.models.random_weights import ARCHITECTURES, build_random_model, random_ids
from experiments.timing import length_plan, prefill_ratios
from experiments.timing.attention_timing import measure_cell
from experiments.timing.cost_model import H100, Shape, dense_flops, floor_ms
from experiments.timing.counted_methods import counted_settings, least_density
from experiments.timing.dense_kernels import dense_kernels
from experiments.timing.densities import ControlledDensity
from experiments.timing.inputs import Cell
from experiments.timing.length_plan import GIB, lack_of_memory, plan_attention, plan_prefill
from experiments.timing.model_cost import Architecture, model_memory, prefill_cost
from experiments.timing.prefill_timing import measure_prefill
from experiments.timing.stopwatch import Effort
from pbs import build_method
from pbs.methods import METHODS

CPU = torch.device("cpu")
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 256,
}
LLAMA = Architecture.of(length_plan.read_config(ARCHITECTURES / "llama31_8b"))
N = 128 * 1024


def test_an_architecture_is_read_from_its_config():
    assert Architecture(4096, 32, 14336, 128256, Shape(32, 8, 128)) == LLAMA
    assert LLAMA.num_parameters == pytest.approx(8.03e9, rel=0.001)
    assert Architecture.of(SimpleNamespace(hidden_size=4, num_local_experts=8)) is None
    assert Architecture.of(SimpleNamespace(hidden_size=4)) is None


def test_a_prefill_is_attention_and_products_with_weights():
    stages = prefill_cost(LLAMA, N)
    assert stages["attention"].flops == 32 * dense_flops(LLAMA.shape, N)
    # Two operations for every weight but the embeddings', and the logits of one token.
    weights = LLAMA.num_parameters - 2 * 4096 * 128256
    assert stages["linear"].flops == pytest.approx(2 * weights * N, rel=1e-4)
    sparse = prefill_cost(LLAMA, N, method="pbs", density=0.25)
    assert sparse["linear"] == stages["linear"]
    assert sparse["attention"].flops == stages["attention"].flops / 4
    assert set(sparse) == {"order", "gather", "selection", "attention", "linear"}


def test_processes_share_the_layers_of_a_model():
    half = LLAMA.share(2)
    assert half.shape == Shape(16, 4, 128)
    whole, part = (prefill_cost(one, N)["attention"].flops for one in (LLAMA, half))
    assert part == whole / 2
    memory = [sum(model_memory(one, N).values()) for one in (LLAMA, half)]
    assert 0.5 < memory[1] / memory[0] < 0.65  # embeddings and the residual stream are whole


def test_what_was_measured_on_an_h100_is_not_less_than_the_plan():
    """Extra bytes of a prefill at 128K beside the weights, experiments/measured/h100_2026-11-23."""
    planned = model_memory(LLAMA, N)
    extra = sum(planned.values()) - planned["weights"]
    assert 0.9 * 32_817_283_072 < extra < 32_817_283_072


def test_512k_tokens_take_two_gpus_of_80_gib_and_no_number_of_small_ones():
    options = {"method": "flash", "density": 1.0, "rates": H100}
    planned = plan_prefill(LLAMA, 4 * N, memory=80 * GIB, **options)
    assert planned.num_devices == 2
    assert planned.needed_bytes < 80 * GIB
    assert planned.floor_ms == floor_ms(prefill_cost(LLAMA.share(2), 4 * N), H100)
    assert plan_prefill(LLAMA, 4 * N, memory=8 * GIB, **options).num_devices is None
    assert plan_attention(LLAMA.shape, N, memory=1 * GIB, **options).num_devices is None
    assert plan_attention(LLAMA.shape, N, memory=4 * GIB, **options).num_devices == 1


def test_the_plan_is_printed(capsys):
    words = ["--memory", "80", "--lengths", "131072", "524288"]
    assert length_plan.main([*words, "--model", str(ARCHITECTURES / "llama31_8b")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[3].split()[:2] == ["524288", "flash"]
    assert lines[3].split()[3] == "2"
    length_plan.main([*words, "--methods", "pbs"])
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_lack_of_memory_is_explained():
    needed = {"weights": 3 * GIB, "cache": 2 * GIB, "empty": 0.0}
    assert lack_of_memory(needed, 5 * GIB) is None
    assert lack_of_memory(needed, None) is None
    found = lack_of_memory(needed, 4 * GIB)
    assert found == "needs at least 5.0 GiB (weights 3.0, cache 2.0), there are 4.0 GiB"


def test_a_host_says_how_much_is_free():
    free = device_bytes("cpu")
    if free is None:
        pytest.skip("the system does not tell")
    assert free > 1 << 20


def test_every_method_is_counted_with_its_own_parameters():
    for name in METHODS:
        assert counted_settings(METHODS.build(name, {}))["method"] == name
    method = build_method("pbs", block_size=64, gqa="shared")
    expected = {"method": "pbs", "block_size": 64, "shared_order": True, "stride": 8}
    assert counted_settings(method) == expected
    assert least_density(method) == 0.0
    wrapped = ControlledDensity(method=method, target_density=0.4)
    assert counted_settings(wrapped) == expected
    assert least_density(wrapped) == 0.4


def test_what_cannot_fit_is_not_tried():
    cell = Cell(Shape(4, 2, 32, 4), 700, torch.float32, CPU, density=0.7)
    inputs = cell.shape.input_bytes(700)
    methods = {"pbs": build_method("pbs"), "meanpool": build_method("meanpool")}
    arguments = (cell, methods, dense_kernels("cpu"))
    once = Effort(0.001, 1, 1)
    found = measure_cell(*arguments, effort=once, memory=1.3 * inputs)
    assert found["methods"]["pbs"]["failure"] == "does not fit"
    assert "k, v in order" in found["methods"]["pbs"]["message"]
    assert found["methods"]["meanpool"]["median_ms"] > 0
    assert found["dense"]["cpu"]["median_ms"] > 0
    nothing = measure_cell(*arguments, effort=once, memory=0.9 * inputs)
    assert nothing["failure"]["failure"] == "does not fit"
    assert nothing["methods"] == {}


def test_a_prefill_that_cannot_fit_is_not_tried(monkeypatch):
    model = build_random_model(
        ARCHITECTURES / "llama31_8b",
        dtype=torch.float32,
        device="cpu",
        changes=SMALL,
    )
    monkeypatch.setattr(prefill_ratios, "device_bytes", lambda _: 1000)
    ids = [random_ids(256, 300, device="cpu")]
    methods = {"pbs": build_method("pbs")}
    record = measure_prefill(model, ids, methods, ["cpu"], effort=Effort(0.001, 1, 1))
    for found in (record["dense"]["cpu"], record["methods"]["pbs"]):
        assert found["failure"] == "does not fit"
        assert "weights" not in found["message"]  # of a host's free memory they take nothing

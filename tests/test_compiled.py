"""Methods and patched models under torch.compile; CUDA graphs on a GPU."""

import copy
import gc

import pytest
import torch

from pbs import build_method, compiled
from pbs.testing import make_qkv
from tests.methods.cases import CASES, build


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("case", sorted(CASES))
def test_every_method_is_one_node_of_a_whole_graph(case):
    q, k, v = make_qkv(1, 4, 2, 150, 16, structure="mixed")
    method = build(case)

    def layer(q, k, v):
        return method(q * 1.5, k, v, scale=0.3, layer_idx=0) + 1

    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(out, layer(q, k, v))


def test_the_operators_fake_agrees_with_it():
    q, k, v = make_qkv(2, 4, 2, 150, 16)
    method = build_method("pbs", block_size=16, segment_size=32)
    arguments = (q, k, v, compiled.handle_of(method), None, None)
    torch.library.opcheck(torch.ops.pbs.attention.default, arguments)


def test_a_copy_of_a_method_has_its_own_handle():
    method = build_method("pbs")
    handle = compiled.handle_of(method)
    other = copy.deepcopy(method)
    assert compiled.handle_of(other) != handle == compiled.handle_of(method)
    assert compiled.owner_of(handle) is method
    del method
    gc.collect()
    with pytest.raises(RuntimeError, match="no longer exists"):
        compiled.owner_of(handle)


def patched_model(num_layers):
    pytest.importorskip("transformers")
    from pbs.patch.huggingface import apply_patch_with_prefill
    from tests.patch.models import make_model

    model = make_model("llama", num_hidden_layers=num_layers)
    method = build_method("pbs", block_size=16, segment_size=32, threshold=0.5)
    return apply_patch_with_prefill(model, method)


def test_layers_of_a_patched_model_do_not_break_the_graph():
    from tests.patch.models import random_ids

    breaks = {}
    for num_layers in (2, 3):
        torch._dynamo.reset()
        found = torch._dynamo.explain(patched_model(num_layers))(
            random_ids(1, 150), use_cache=False
        )
        assert all("padding_mask" in str(reason.reason) for reason in found.break_reasons)
        breaks[num_layers] = found.graph_break_count
    assert breaks[2] == breaks[3]


def test_a_compiled_patched_model_computes_and_reports_the_same():
    from pbs.patch.huggingface import get_patch
    from tests.patch.models import random_ids

    model, ids = patched_model(2), random_ids(2, 150)
    padding = torch.ones_like(ids)
    padding[1, :40] = 0
    fast = torch.compile(model, backend="aot_eager")
    for arguments in ({}, {"attention_mask": padding}):
        get_patch(model).reset()
        expected = model(ids, use_cache=False, **arguments)[0]
        report = get_patch(model).report()
        get_patch(model).reset()
        out = fast(ids, use_cache=False, **arguments)[0]
        real = padding.bool() if arguments else torch.ones_like(ids, dtype=torch.bool)
        torch.testing.assert_close(out[real], expected[real])
        assert get_patch(model).report() == report
        assert report.sparse_calls >= 2


def test_a_compiled_model_still_refuses_packed_sequences():
    from tests.patch.models import random_ids

    positions = torch.cat([torch.arange(100), torch.arange(50)])[None]
    fast = torch.compile(patched_model(2), backend="aot_eager")
    with pytest.raises(NotImplementedError, match="packed sequences"):
        fast(random_ids(1, 150), position_ids=positions, use_cache=False)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["pbs", "meanpool"])
def test_a_captured_cuda_graph_replays_on_new_inputs(name):
    first, second = (
        make_qkv(1, 8, 2, 4096, 128, seed=seed, structure="mixed", dtype=torch.bfloat16)
        for seed in (0, 1)
    )
    method = build_method(name, threshold=0.8)
    static = [x.cuda() for x in first]
    for _ in range(3):  # compiles, and fills what is kept between calls
        method(*static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = method(*static)
    for x, value in zip(static, second, strict=True):
        x.copy_(value)
    graph.replay()
    torch.testing.assert_close(out, method(*static))

"""The vLLM plug-in over stand-ins for vLLM's kernels: splitting, paging, counting, settings."""

import importlib
import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch

from pbs import build_method
from pbs.patch.vllm import batch, counters
from pbs.patch.vllm.settings import ServingSettings
from pbs.patch.vllm.watch import LATENT, watch
from tests.patch.vllm.stand_in import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    PAGE,
    SCALE,
    AttentionLayer,
    Common,
    LatentLayer,
    install,
)

# A decoding step, a prompt with a cached prefix, a decoding step, a whole prompt, a short chunk.
QUERIES, LENGTHS = [1, 700, 1, 1300, 20], [333, 1500, 40, 1300, 600]
PREFILLING = [False, True, False, True, True]
LAYER = SimpleNamespace(layer_name="model.layers.3.self_attn.attn", isa="stand-in")
SPARSE = {"method": "pbs", "threshold": 0.5}


def config_of(settings, backend=None):
    return SimpleNamespace(
        additional_config=None if settings is None else {"pbs": settings},
        attention_config=SimpleNamespace(backend=backend),
        model_config=SimpleNamespace(max_model_len=4096),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )


@pytest.fixture(autouse=True)
def fresh_counters(monkeypatch):
    monkeypatch.setattr(counters.COUNTERS, "_layers", {})
    monkeypatch.setattr(counters.COUNTERS, "start", lambda: False)


@pytest.fixture(params=["cpu", "cuda"])
def platform(request, monkeypatch):
    """``make(settings, **layer)`` gives a builder and a layer of a platform's backend."""
    name = f"pbs.patch.vllm.{request.param}"

    def make(settings, *, backend=None, **layer):
        config = config_of(settings, backend)
        install(monkeypatch, config)
        monkeypatch.delitem(sys.modules, name, raising=False)
        module = importlib.import_module(name)
        backend_class = module.SparseCPUBackend if "cpu" in name else module.SparseFlashBackend
        builder = backend_class.get_builder_cls()(None, [], config, "cpu")
        return builder, backend_class.get_impl_cls()(**layer)

    yield make
    sys.modules.pop(name, None)


def make_batch(layer, *, is_token_major=False):
    """Queries, new keys and values, the cache that holds them all, and vLLM's metadata."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.tensor([0, *QUERIES]).cumsum(0).int()
    need = [-(-length // PAGE) for length in LENGTHS]
    pages = torch.randperm(sum(need) + 7, generator=generator)
    table = torch.zeros(len(need), max(need), dtype=torch.int32)
    cache = torch.randn(len(pages), KV_HEADS, PAGE, 2 * HEAD_DIM, generator=generator)
    q = torch.randn(int(starts[-1]), HEADS, HEAD_DIM, generator=generator)
    rows = []
    for i, count in enumerate(need):
        table[i, :count] = pages[sum(need[:i]) : sum(need[: i + 1])]
        tokens = cache[table[i, :count].long()].transpose(1, 2).flatten(0, 1)
        rows.append(tokens[LENGTHS[i] - QUERIES[i] : LENGTHS[i]])
    key, value = torch.cat(rows).chunk(2, dim=-1)
    if is_token_major:
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    common = Common(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(LENGTHS, dtype=torch.int32),
        num_reqs=len(LENGTHS),
        num_actual_tokens=int(starts[-1]),
        max_query_len=max(QUERIES),
        max_seq_len=max(LENGTHS),
        block_table_tensor=table,
        slot_mapping=torch.arange(int(starts[-1])),
        is_prefilling=torch.tensor(PREFILLING),
        seq_lens_cpu_upper_bound=torch.tensor(LENGTHS, dtype=torch.int32),
    )
    return q, key, value, layer.pack(cache) if hasattr(layer, "pack") else cache, common


def run(platform, settings, *, is_token_major=False, change=None, **layer):
    builder, built = platform(settings, **layer)
    q, key, value, cache, common = make_batch(built, is_token_major=is_token_major)
    if change:
        common = common.replace(**change)
    metadata = builder.build(0, common)
    out = built.forward(LAYER, q, key, value, cache, metadata, torch.zeros_like(q))
    return out, (q, key, value, cache, common), built


@pytest.mark.parametrize("is_token_major", [False, True])
def test_at_threshold_1_a_mixed_batch_gets_what_vllm_computes(platform, is_token_major):
    stock, *_ = run(platform, None, is_token_major=is_token_major)
    ours, *_ = run(platform, {"threshold": 1.0}, is_token_major=is_token_major)
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)
    counts = counters.COUNTERS.to_dict()["3"]
    assert counts["sparse"] == 2
    assert counts["density"] == 1.0
    assert counts["dense"] == {"a chunk of fewer tokens than decode_below=128": 1}


def test_a_prompt_gets_what_the_method_gives_it_alone_and_others_are_not_touched(platform):
    stock, *_ = run(platform, None)
    ours, (q, _, _, cache, common), layer = run(platform, SPARSE)
    method = build_method("pbs", threshold=0.5)
    starts = common.query_start_loc.tolist()
    for i, length in enumerate(LENGTHS):
        rows = slice(starts[i], starts[i + 1])
        if i not in (1, 3):
            torch.testing.assert_close(ours[rows], stock[rows], atol=1e-6, rtol=1e-6)
            continue
        pages = layer.unpack(cache[common.block_table_tensor[i, : -(-length // PAGE)].long()])
        k, v = pages.transpose(1, 2).flatten(0, 1)[:length].chunk(2, dim=-1)
        alone = method(*(x.transpose(0, 1)[None] for x in (q[rows], k, v)), scale=SCALE)
        torch.testing.assert_close(ours[rows], alone[0].transpose(0, 1), atol=1e-5, rtol=1e-5)
        assert (ours[rows] - stock[rows]).abs().max() > 1e-3
    counts = counters.COUNTERS.to_dict()["3"]
    assert 0 < counts["tiles"] < counts["causal_tiles"]
    assert counts["density"] == counts["tiles"] / counts["causal_tiles"]
    said = counters.COUNTERS.summary()
    assert said.startswith("2 chunks of prompts sparse, 1 dense over all layers; 0.")
    assert said.endswith(f"{counts['density']:.3f} of the causal tiles computed")


def test_only_prompts_need_no_rest_and_only_decoding_no_method(platform):
    builder, layer = platform(SPARSE)
    *_, common = make_batch(layer)
    prompt = common.replace(is_prefilling=torch.tensor([True] * 5))
    assert [chunk.request for chunk in builder.build(0, prompt).pbs.chunks] == [1, 3]
    decoding = common.replace(is_prefilling=torch.tensor([False] * 5))
    assert builder.build(0, decoding).pbs is None
    padded = common.replace(is_prefilling=torch.tensor([False] * 3))  # a captured graph's sizes
    assert builder.build(0, padded).pbs is None
    one = common.replace(
        num_reqs=1,
        query_start_loc_cpu=torch.tensor([0, 700]),
        is_prefilling=torch.tensor([True]),
        seq_lens_cpu_upper_bound=torch.tensor([700]),
    )
    split = builder.build(0, one).pbs
    assert split.rest is None
    assert split.chunks == [batch.Chunk(0, 0, 700, 700)]


@pytest.mark.parametrize(
    ("settings", "layer", "reason"),
    [
        ({"skip_layers": [3]}, {}, "skip_layers"),
        ({"skip_layers": "[1,3]"}, {}, "skip_layers"),
        ({"min_keys": 5000}, {}, "fewer keys than min_keys=5000"),
        ({}, {"sinks": torch.zeros(HEADS)}, "attention sinks"),
        ({}, {"sliding_window": (128, 0)}, "sliding window"),
    ],
)
def test_what_stays_dense_is_counted_with_its_reason(platform, settings, layer, reason):
    stock, *_ = run(platform, None)
    ours, *_ = run(platform, SPARSE | settings, **layer)
    torch.testing.assert_close(ours, stock)
    counts = counters.COUNTERS.to_dict()["3"]
    assert counts["sparse"] == counts["tiles"] == 0
    assert counts["dense"][reason] >= 2


@pytest.mark.parametrize(
    ("settings", "heads"),
    [({}, 2 * 8 + 2 * 32), ({"gqa": "shared"}, 4 * 8), ({"method": "xattention"}, 2 * 8)],
)
@pytest.mark.parametrize("platform", ["cuda"], indirect=True)
def test_memory_beside_the_cache_is_claimed(platform, settings, heads):
    platform(SPARSE)  # stand-ins for vLLM
    from pbs.patch.vllm.cuda import gathered_heads

    method = ServingSettings.of(config_of(settings)).build()
    assert gathered_heads(method, num_heads=32, num_kv_heads=8) == heads


@pytest.mark.parametrize("platform", ["cuda"], indirect=True)
def test_masks_that_are_not_causal_stay_vllms(platform):
    out, *_ = run(platform, SPARSE, change={"mm_req_doc_ranges": {0: [(0, 4)]}})
    stock, *_ = run(platform, None)
    torch.testing.assert_close(out, stock)
    assert counters.COUNTERS.to_dict()["3"]["dense"] == {"a mask that is not causal": 5}


@pytest.mark.parametrize("platform", ["cuda"], indirect=True)
def test_captured_graphs_and_other_page_tables(platform):
    builder, layer = platform(SPARSE)
    *_, common = make_batch(layer)
    assert builder.build_for_cudagraph_capture(common).pbs is None
    assert builder.pbs is not None
    metadata = builder.build(0, common)
    table, slots = common.block_table_tensor + 1, common.slot_mapping + 1
    moved = builder.update_block_table(metadata, table, slots)
    assert torch.equal(moved.pbs.rest.block_table, table[[0, 2, 4]])
    assert torch.equal(moved.pbs.rest.slot_mapping, slots[[0, 701, *range(2002, 2022)]])
    assert torch.equal(metadata.pbs.rest.block_table, common.block_table_tensor[[0, 2, 4]])
    builder.vllm_config.parallel_config.decode_context_parallel_size = 2
    with pytest.raises(NotImplementedError, match="context parallelism"):
        type(builder)(None, [], builder.vllm_config, "cpu")


def test_it_is_off_unless_it_is_asked_for():
    assert ServingSettings.of(config_of(None)) is None
    custom = SimpleNamespace(name="CUSTOM")
    assert ServingSettings.of(config_of(None, custom)) == ServingSettings()
    found = ServingSettings.of(config_of({"method": "minference", "vertical_size": 64}))
    assert (found.method, found.params) == ("minference", {"vertical_size": 64})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "pbss"}, "Did you mean 'pbs'"),
        ({"treshold": 0.5}, "Did you mean 'threshold'"),
        ({"min_key": 5}, "Did you mean 'min_keys'"),
        ({"threshold": 1.5}, "threshold"),
        ({"min_keys": -1}, "min_keys"),
        ({"skip_layers": [-2]}, "skip_layers"),
        ("pbs", "must be a mapping"),
    ],
)
def test_wrong_settings_stop_the_server(settings, message):
    with pytest.raises(ValueError, match=message):
        ServingSettings.of(config_of(settings))


@pytest.fixture
def watched(monkeypatch):
    """``start(settings)`` watches the stand-ins for vLLM's layers."""
    for layer_class in (AttentionLayer, LatentLayer):
        monkeypatch.setattr(layer_class, "__init__", layer_class.__init__)

    def start(settings):
        install(monkeypatch, config_of(settings))
        watch()

    return start


class OtherBackend:
    @staticmethod
    def get_name():
        return "FLASHINFER"


def test_a_layer_that_gets_another_backend_stops_the_server(watched):
    watched(SPARSE)
    with pytest.raises(ValueError, match=r"layers.0.attn got .*FLASHINFER.*--attention-backend"):
        AttentionLayer("model.layers.0.attn", OtherBackend, SimpleNamespace())


def test_without_settings_any_backend_will_do(watched):
    watched(None)
    AttentionLayer("model.layers.0.attn", OtherBackend, SimpleNamespace())
    layer = LatentLayer("model.layers.0.attn")
    layer.forward_impl(torch.ones(2), SimpleNamespace(num_prefills=1), torch.zeros(2))
    assert counters.COUNTERS.to_dict() == {}


@pytest.mark.parametrize("is_derived", [False, True])
def test_backends_that_vllm_derives_stay_dense(watched, platform, is_derived):
    watched(SPARSE)
    _, impl = platform(SPARSE)
    ours = {"get_name": staticmethod(lambda: "CUSTOM")}
    module = "vllm.chunked" if is_derived else "pbs.patch.vllm.cuda"
    backend = type("Backend", (), {**ours, "__module__": module})
    AttentionLayer("model.layers.0.attn", backend, impl)
    assert impl.pbs.reason == ("backend CUSTOM" if is_derived else "")


def test_latent_layers_are_counted_as_dense(watched):
    watched(SPARSE)
    layer = LatentLayer("model.layers.1.attn")
    out = torch.zeros(2)
    layer.forward_impl(torch.ones(2), SimpleNamespace(num_prefills=3), output=out)
    layer.forward_impl(torch.ones(2), attn_metadata=SimpleNamespace(num_prefills=0), output=out)
    layer.forward_impl(torch.ones(2), attn_metadata=SimpleNamespace(), output=out)
    layer.forward_impl(torch.ones(2), None, out)  # a profiling run
    assert bool((out == 1).all())
    assert counters.COUNTERS.to_dict()["1"]["dense"] == {LATENT: 4}


def test_registration_names_classes_and_metrics_read_every_workers_file(
    monkeypatch, tmp_path, watched
):
    del watched  # which restores what is extended
    registered = install(monkeypatch, config_of(SPARSE))
    from pbs.patch import vllm as plugin
    from pbs.patch.vllm.metrics import Collector

    monkeypatch.setenv(counters.FOLDER, str(tmp_path))
    plugin.register()
    once = AttentionLayer.__init__
    plugin.register()
    assert AttentionLayer.__init__ is once
    assert registered == {
        "CPU_ATTN": "pbs.patch.vllm.cpu.SparseCPUBackend",
        "CUSTOM": "pbs.patch.vllm.cuda.SparseFlashBackend",
    }
    counters.COUNTERS.layer(3).add_dense({"skip_layers": 2})
    counters.COUNTERS.write()
    counts = {"sparse": 4, "dense": {}, "tiles": 10, "causal_tiles": 40, "density": 0.25}
    (tmp_path / "7.json").write_text(json.dumps({"0": counts}))
    chunks, tiles, causal = Collector(tmp_path).collect()
    assert chunks.samples[("7", "0", "sparse")] == 4
    assert chunks.samples[(str(os.getpid()), "3", "dense: skip_layers")] == 2
    assert (tiles.samples[("7", "0")], causal.samples[("7", "0")]) == (10, 40)

import json
import logging

import pytest
import torch

from baselines.vertical_slash import keep_largest, vertical_slash_lists
from pbs import block_sparse_attention, build_method
from pbs.ops import AttentionPlan, BlockGrid
from pbs.ops.last_query_scores import last_query_scores
from pbs.testing import assert_within_budget, make_qkv
from tests.baselines import vertical_slash_truth as truth
from tests.ops.attention_truth import causal_mask, eager_attention, exact_attention

SMALL = {"vertical_size": 20, "slash_size": 12, "num_sinks": 4, "num_local": 8}
VERTICAL_SLASH = ["vertical_and_slash", 20, 12, 1.0]
A_SHAPE = ["stream_llm", 10, 70, 0.5]
BLOCK_SPARSE = ["block_sparse", 1000, 6096, 0.25]


def draw_lines(num_heads, num_keys, num_columns, num_offsets, seed, num_local=1, sequences=1):
    """Random columns and offsets, the first offsets always among them: bool [Z, H, N] twice."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(2, sequences, num_heads, num_keys, generator=generator)
    scores[1, ..., :num_local] = 2.0
    return (
        keep_largest(scores[0], [min(num_columns, num_keys)] * num_heads),
        keep_largest(scores[1], [min(num_offsets, num_keys)] * num_heads),
    )


def plan_of(columns, offsets, grid):
    """A plan of vertical-slash heads only."""
    lists = vertical_slash_lists(columns, offsets, grid)
    nothing = torch.zeros(1, 1, grid.num_query_tiles, 0, dtype=torch.int32)
    counts = torch.zeros(1, 1, grid.num_query_tiles, dtype=torch.int32)
    return AttentionPlan(grid, *columns.shape[:2], nothing, counts, *lists)


@pytest.mark.parametrize("num_offsets", [1, 3, 20, 200])
@pytest.mark.parametrize("num_columns", [1, 30, 400])
@pytest.mark.parametrize(
    ("num_queries", "num_keys"),
    [(1, 1), (63, 63), (64, 64), (65, 65), (1, 300), (40, 300), (700, 1500), (1473, 1473)],
)
def test_computed_pairs_equal_the_walk_tile_by_tile(
    num_queries, num_keys, num_columns, num_offsets
):
    grid = BlockGrid(num_queries, num_keys, 64, 64)
    columns, offsets = draw_lines(3, num_keys, num_columns, num_offsets, seed=num_keys)
    plan = plan_of(columns, offsets, grid)
    tokens, tiles = plan.token_mask(), plan.num_tiles()
    for head in range(3):
        expected, num_tiles = truth.executed_mask(
            columns[0, head].nonzero().flatten().tolist(),
            offsets[0, head].nonzero().flatten().tolist(),
            num_queries,
            num_keys,
        )
        assert torch.equal(tokens[0, head], expected)
        assert tiles[0, head] == num_tiles


def test_computed_pairs_hold_every_chosen_line():
    columns, offsets = draw_lines(4, 1000, 40, 60, seed=1)
    plan = plan_of(columns, offsets, BlockGrid(1000, 1000, 64, 64))
    distance = torch.arange(1000)[:, None] - torch.arange(1000)
    on_slash = offsets[:, :, distance.clamp(min=0)]
    chosen = (on_slash | columns[:, :, None]) & causal_mask(1000, 1000)
    assert not (chosen & ~plan.token_mask()).any()


def test_lists_do_not_depend_on_the_chunks_they_are_made_in(monkeypatch):
    q, k, _ = make_qkv(2, 6, 2, 700, 32, structure="mixed")
    method = build_method("minference", **SMALL)
    at_once = method.plan(q, k)
    monkeypatch.setattr("pbs.ops.last_query_scores.reference.MAX_ELEMENTS", 1)
    monkeypatch.setattr("pbs.ops.slash_windows.reference.MAX_ELEMENTS", 1)
    chunked = method.plan(q, k)
    for name in ("windows", "num_windows", "columns", "num_columns"):
        assert torch.equal(getattr(at_once, name), getattr(chunked, name))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("last_q", [1, 64, 1000])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (30, 200), (300, 300)])
def test_scores_are_the_last_queries_attention_by_key_and_by_offset(
    num_queries, num_keys, last_q, backend
):
    q, k, _ = make_qkv(2, 6, 2, num_keys, 64, num_queries=num_queries, structure="mixed")
    vertical, slash = last_query_scores(q, k, scale=0.125, last_q=last_q, backend=backend)
    for sequence in range(2):
        for head in range(6):
            expected = truth.last_query_scores(
                q[sequence, head], k[sequence, head // 3], 0.125, last_q
            )
            got = (vertical[sequence, head].double(), slash[sequence, head].double())
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_largest_scores_with_ties_to_the_lower_index():
    scores = torch.tensor([[[3.0, 1.0, 2.0, 2.0, 2.0]], [[0.0] * 5]]).transpose(0, 1)
    kept = keep_largest(scores, [3, 2])
    assert kept.tolist() == [[[True, False, True, True, False], [True, True, False, False, False]]]
    forced = torch.full((1, 1, 200), float("inf"))
    assert keep_largest(forced, [60])[0, 0].nonzero().flatten().tolist() == list(range(60))


@pytest.mark.parametrize(
    ("num_queries", "params"),
    [
        (1100, SMALL),
        (300, SMALL),
        (1100, {"vertical_size": 200, "slash_size": 10}),  # the fewest offsets are 100
        (1100, {"vertical_size": 1, "slash_size": 150, "last_q": 5}),  # the fewest columns are 30
        (1100, {"preset": "adaptive", "adaptive_budget": 0.2}),
    ],
)
def test_plan_of_a_call_equals_the_whole_method_the_slow_way(num_queries, params):
    num_keys, scale = 1100, 0.2
    q, k, _ = make_qkv(1, 3, 1, num_keys, 32, num_queries=num_queries, structure="mixed", seed=5)
    method = build_method("minference", **params)
    plan = method.plan(q, k, scale=scale)
    assert plan.reason == ""
    budget = round(0.04 * num_keys), round(0.16 * num_keys)
    num_columns = max(method.vertical_size or budget[0], method.num_sinks)
    num_offsets = max(method.slash_size or budget[1], method.num_local)
    for head in range(3):
        vertical, slash = truth.last_query_scores(q[0, head], k[0, 0], scale, method.last_q)
        expected, num_tiles = truth.executed_mask(
            truth.largest(vertical, num_columns, method.num_sinks),
            truth.largest(slash, num_offsets, method.num_local),
            num_queries,
            num_keys,
        )
        assert torch.equal(plan.token_mask()[0, head], expected)
        assert plan.num_tiles()[0, head] == num_tiles


# Table of executed densities at 8K in the notes on MInference: (smallest, largest).
@pytest.mark.parametrize(
    ("num_columns", "num_offsets", "smallest", "largest"),
    [(1000, 6096, 0.95, 1.0), (512, 2048, 0.49, 1.0), (3500, 100, 0.46, None)],
)
def test_executed_density_at_8k_is_the_published_one(num_columns, num_offsets, smallest, largest):
    grid = BlockGrid(8192, 8192, 64, 64)
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(1, 1, 8192, generator=generator)
    scores[..., :30] = 2.0
    columns = keep_largest(scores, [num_columns])
    near = torch.arange(8192).expand(1, 1, -1) < num_offsets
    density = plan_of(columns, near, grid).density().item()
    assert density == pytest.approx(smallest, abs=0.01)
    if largest is not None:
        scores = torch.rand(1, 1, 8192, generator=generator)
        scores[..., :100] = 2.0
        scattered = keep_largest(scores, [num_offsets])
        density = plan_of(columns, scattered, grid).density().item()
        assert density == pytest.approx(largest, abs=0.01)


def write(tmp_path, layers):
    path = tmp_path / "heads.json"
    path.write_text(layers if isinstance(layers, str) else json.dumps(layers))
    return str(path)


def official(path, **params):
    small = {"num_sinks": 4, "num_local": 8, "top_k": 2, "decode_below": 0, **params}
    return build_method("minference", preset="official", config_path=path, **small)


def a_shape_mask(num_queries, num_keys, n_init, n_local):
    keys = torch.arange(num_keys)
    distance = keys[num_keys - num_queries :, None] - keys
    return (distance >= 0) & ((keys < n_init) | (distance < n_local))


@pytest.mark.parametrize(("num_queries", "num_keys"), [(600, 600), (200, 600), (65, 300)])
def test_heads_of_all_patterns_in_one_plan(tmp_path, num_queries, num_keys):
    q, k, v = make_qkv(2, 6, 2, num_keys, 32, num_queries=num_queries, structure="mixed")
    heads = [VERTICAL_SLASH, A_SHAPE, BLOCK_SPARSE, ["stream_llm", 0, 10**12], VERTICAL_SLASH]
    heads.append(["vertical_and_slash", 40, 9, 0.1])
    path = write(tmp_path, [{str(i): head for i, head in reversed(list(enumerate(heads)))}])
    method = official(path)
    plan = method.plan(q, k, layer_idx=0)
    tokens = plan.token_mask()
    causal = causal_mask(num_queries, num_keys)
    small = build_method("minference", **{**SMALL, "vertical_size": 20}).plan(q, k)
    assert torch.equal(tokens[:, [0, 4]], small.token_mask()[:, [0, 4]])
    other = build_method("minference", **{**SMALL, "vertical_size": 40, "slash_size": 9})
    assert torch.equal(tokens[:, 5], other.plan(q, k).token_mask()[:, 5])
    expected = a_shape_mask(num_queries, num_keys, 10, 70)
    assert torch.equal(tokens[:, 1], expected.expand(2, -1, -1))
    assert torch.equal(tokens[:, 3], causal.expand(2, -1, -1))
    for sequence in range(2):
        expected = slow_block_sparse(q[sequence, 2], k[sequence, 0], top_k=2)
        assert torch.equal(tokens[sequence, 2], expected)
    mask, scale = plan.token_mask(), 32**-0.5
    out = method(q, k, v, layer_idx=0)
    exact = exact_attention(q, k, v, mask, scale)
    assert_within_budget(out, eager_attention(q, k, v, mask, scale), exact)


def slow_block_sparse(q, k, top_k):
    """One head: per query tile the causal key tiles with the largest mean logit, and its own."""
    num_queries, num_keys = len(q), len(k)
    shift = num_keys - num_queries
    mask = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    for row in range(0, num_queries, 64):
        last = min(row + 64, num_queries) + shift - 1
        mean = q[row : row + 64].mean(0)
        scores = [
            float(k[key : key + 64].mean(0) @ mean) for key in range(0, last // 64 * 64 + 1, 64)
        ]
        kept = sorted(range(len(scores)), key=lambda tile: -scores[tile])[:top_k]
        for tile in [*kept, *range((row + shift) // 64, last // 64 + 1)]:
            mask[row : row + 64, tile * 64 : tile * 64 + 64] = True
    return mask & causal_mask(num_queries, num_keys)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(200, 200), (70, 200), (129, 129)])
def test_kernels_compute_exactly_the_pairs(tmp_path, backend, num_queries, num_keys):
    q, k, v = make_qkv(1, 4, 2, num_keys, 32, num_queries=num_queries, structure="mixed")
    lines, window = ["vertical_and_slash", 12, 9, 0], ["stream_llm", 3, 20, 0]
    blocks = ["block_sparse", 0, 0, 0]
    for heads in ([lines] * 4, [lines, window, blocks, lines], [window] * 4):
        path = write(tmp_path, [dict(zip("0123", heads, strict=True))])
        plan = official(path, top_k=1).plan(q, k, layer_idx=0)
        mask = plan.token_mask()
        out = block_sparse_attention(q, k, v, plan, backend=backend)
        eager = eager_attention(q, k, v, mask, 32**-0.5)
        assert_within_budget(out, eager, exact_attention(q, k, v, mask, 32**-0.5))


@pytest.mark.parametrize(
    ("params", "num_keys", "is_dense"),
    [
        ({}, 6096, True),
        ({}, 6097, False),
        ({"preset": "llama31-v2"}, 2048, True),
        ({"preset": "llama31-v2"}, 2049, False),
        ({"slash_size": 1}, 1001, False),
        ({"slash_size": 1}, 1000, True),  # all columns are all pairs
        ({"vertical_size": 1, "slash_size": 1}, 100, True),
        ({"vertical_size": 1, "slash_size": 1}, 101, False),
        ({"preset": "adaptive", "adaptive_budget": 0.1}, 101, False),
    ],
)
def test_inputs_within_the_budget_run_dense(params, num_keys, is_dense):
    q, k, _ = make_qkv(1, 2, 1, num_keys, 16)
    plan = build_method("minference", **params).plan(q[:, :, -70:], k)
    assert plan.is_dense == is_dense
    assert plan.reason == ("no more keys than the budget of every head" if is_dense else "")


def test_head_within_its_budget_is_dense_beside_sparse_heads(tmp_path):
    q, k, _ = make_qkv(1, 2, 1, 300, 32)
    heads = {"0": ["vertical_and_slash", 300, 10, 0], "1": VERTICAL_SLASH}
    plan = official(write(tmp_path, [heads])).plan(q, k, layer_idx=0)
    assert torch.equal(plan.token_mask()[0, 0], causal_mask(300, 300))
    assert plan.density()[0, 0] == 1
    assert not torch.equal(plan.token_mask()[0, 1], causal_mask(300, 300))


def test_each_layer_has_its_own_heads_and_the_first_ones_may_run_dense(tmp_path):
    q, k, _ = make_qkv(1, 2, 1, 300, 32)
    path = write(tmp_path, [{"0": A_SHAPE, "1": A_SHAPE}, {"0": BLOCK_SPARSE, "1": VERTICAL_SLASH}])
    method = official(path)
    assert method.plan(q, k, layer_idx=0).local_window.tolist() == [[10, 70], [10, 70]]
    assert method.plan(q, k, layer_idx=1).local_window is None
    method = build_method("minference", starting_layer=2, **SMALL)
    reasons = [method.plan(q, k, layer_idx=layer).reason for layer in range(4)]
    assert reasons == ["layer below starting_layer"] * 2 + ["", ""]
    with pytest.raises(ValueError, match="starting_layer=2 needs the layer: pass layer_idx"):
        method.plan(q, k)
    assert build_method("minference", starting_layer=0, **SMALL).plan(q, k).reason == ""


def test_densest_setting_of_every_preset_is_dense(tmp_path):
    q, k, _ = make_qkv(1, 2, 1, 300, 32)
    path = write(tmp_path, [{"0": A_SHAPE, "1": VERTICAL_SLASH}])
    for method in (
        official(path),
        build_method("minference", preset="adaptive", adaptive_budget=0.1),
        build_method("minference", **SMALL),
    ):
        assert method.densest().plan(q, k).is_dense


def test_default_preset_says_what_it_is(caplog):
    with caplog.at_level(logging.WARNING):
        build_method("minference")
        build_method("minference", preset="llama31-v2")
        build_method("minference", **SMALL)
    assert len(caplog.records) == 1
    assert "preset 'paper'" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "is not JSON"),
        ("{}", "expected a list with one object per layer, got an empty dict"),
        ("[]", "got an empty list"),
        ({"0": VERTICAL_SLASH}, "got a dict"),
        ([[VERTICAL_SLASH]], "layer 0: expected an object of heads, got a list"),
        ([{"0": A_SHAPE}, {}], "layer 1: expected an object of heads, got an empty dict"),
        ([{"a": A_SHAPE}], "expected head indices as keys .* got 'a'"),
        ([{"0": A_SHAPE, "2": A_SHAPE}], "expected heads 0 to 2, missing 1. Every head"),
        ([{"1": A_SHAPE}], "missing 0"),
        ([{"0": A_SHAPE, "1": A_SHAPE}, {"0": A_SHAPE}], "layer 0 has 2, layer 1 has 1. Add"),
        ([{"0": ["stream_lm", 1, 2, 3]}], "head 0: unknown pattern 'stream_lm'. Did you mean"),
        ([{"0": [["x"], 1, 2, 3]}], "unknown pattern"),
        ([{"0": "stream_llm"}], r"expected \[pattern, a, b, score\], got 'stream_llm'"),
        ([{"0": ["stream_llm", 3]}], r"expected \[pattern, a, b, score\]"),
        ([{"0": ["stream_llm", 1, 2.5, 3]}], "expected two integers of at least 0"),
        ([{"0": ["stream_llm", -1, 2, 3]}], "expected two integers of at least 0"),
        ([{"0": ["stream_llm", 1, 0, 3]}], "local window of at least 1"),
    ],
)
def test_wrong_head_files_are_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        official(write(tmp_path, content))


def test_head_files_of_another_model_are_refused(tmp_path):
    q, k, _ = make_qkv(1, 4, 2, 300, 32)
    with pytest.raises(FileNotFoundError, match=r"no head configuration at .*nothing\.json"):
        official(str(tmp_path / "nothing.json"))
    method = official(write(tmp_path, [{"0": A_SHAPE, "1": A_SHAPE}]))
    with pytest.raises(ValueError, match="1 layers of 2 heads, got layer 0 of 4 heads; use"):
        method.plan(q, k, layer_idx=0)
    for layer in (1, -1):
        with pytest.raises(ValueError, match=f"got layer {layer} of 2 heads"):
            method.plan(q[:, :2], k, layer_idx=layer)
    with pytest.raises(ValueError, match="settings per layer: pass layer_idx"):
        method.plan(q[:, :2], k)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"preset": "papers"}, ValueError, "unknown preset 'papers'. Did you mean 'paper'"),
        ({"preset": "official"}, ValueError, "preset 'official' needs config_path"),
        ({"preset": "adaptive"}, ValueError, "preset 'adaptive' needs adaptive_budget"),
        ({"config_path": "x.json"}, ValueError, "config_path is for preset 'official', got"),
        ({"adaptive_budget": 0.1}, ValueError, "adaptive_budget is for preset 'adaptive'"),
        (
            {"preset": "adaptive", "adaptive_budget": 0.1, "slash_size": 3},
            ValueError,
            "slash_size replaces a size of presets paper, llama31-v2; preset 'adaptive' has",
        ),
        ({"preset": "adaptive", "adaptive_budget": 0.0}, ValueError, r"\(0, 1\], got 0.0"),
        ({"preset": "adaptive", "adaptive_budget": "1"}, TypeError, "must be a number"),
        ({"vertical_size": 0}, ValueError, "vertical_size must be at least 1, got 0"),
        ({"slash_size": 2.0}, TypeError, "slash_size must be an integer, got 2.0"),
        ({"last_q": None}, TypeError, "last_q must be an integer, got None"),
        ({"last_q": 0}, ValueError, "last_q must be at least 1"),
        ({"num_local": 0}, ValueError, "num_local must be at least 1"),
        ({"num_sinks": -1}, ValueError, "num_sinks must be at least 0"),
        ({"top_k": True}, TypeError, "top_k must be an integer"),
        ({"starting_layer": -2}, ValueError, "starting_layer must be at least -1"),
    ],
)
def test_wrong_parameters_are_refused(params, error, message):
    with pytest.raises(error, match=message):
        build_method("minference", **params)

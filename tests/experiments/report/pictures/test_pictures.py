"""Pictures are written, show what they claim, and say so in words."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.gate.coverage import measure_coverage
from experiments.report.pictures import (
    LOOKS,
    CapturedCall,
    capture_call,
    choose_head,
    choose_heads,
    draw_accuracy_density,
    draw_attention_maps,
    draw_map_gallery,
    look_of,
    map_panels,
)
from experiments.report.pictures.looks import ORDER_LOOKS, SHARED_LOOK, look_of_settings
from pbs import build_method
from pbs.orders import ORDERS
from pbs.testing import make_qkv

SCALE = 32**-0.5
# Machado et al. (2009), severity 1: normal, protanopia, deuteranopia.
EYES = [
    np.eye(3),
    [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
]
PBS = {"block_size": 32, "segment_size": 128, "threshold": 0.7}


@pytest.fixture
def figures(monkeypatch):
    """The figures saved during a test."""
    saved = []
    save = Figure.savefig

    def keep(self, *args, **kwargs):
        if self not in saved:
            saved.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def texts(figure):
    """All words of a figure that are not empty."""
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def runs():
    """Four methods, two of them swept."""
    points = {
        "flash": [("", 1.0, 0.975)],
        "pbs": [("τ=0.5", 0.18, 0.85), ("τ=0.7", 0.27, 0.95), ("τ=0.9", 0.45, 0.975)],
        "meanpool": [("τ=0.5", 0.25, 0.625), ("τ=0.9", 0.55, 0.95)],
        "my_method": [("", 0.3, 0.5)],
    }
    return pd.DataFrame(
        [
            {
                "method": method,
                "setting": setting,
                "density": density,
                "accuracy": accuracy,
                "num_samples": 40,
                "model": "tiny",
                "bench": "needle",
                "lengths": "1024-8192",
            }
            for method, each in points.items()
            for setting, density, accuracy in each
        ]
    )


def distance(first, second, matrix):
    """How far apart two colours are to an eye that sees them through this matrix."""
    pair = [matrix @ np.array(to_rgb(colour)) for colour in (first, second)]
    return float(np.linalg.norm(pair[0] - pair[1]))


def test_every_method_looks_different_to_every_eye():
    for first, second in combinations(LOOKS.values(), 2):
        assert first.marker != second.marker
        assert min(distance(first.colour, second.colour, np.array(eye)) for eye in EYES) > 0.06
    names = {"flash", "pbs", "pbs_plus", "meanpool", "minference", "xattention"}
    assert names | {"flexprefill", "streaming", "prism"} <= set(LOOKS)


def test_orders_of_pbs_look_different_too_and_keep_the_looks_of_known_methods():
    assert look_of_settings({"name": "pbs", "order": "last_block"}) == LOOKS["pbs"]
    assert look_of_settings({"name": "meanpool"}) == LOOKS["meanpool"]
    assert ORDER_LOOKS["none"].colour == LOOKS["meanpool"].colour
    assert ORDER_LOOKS["last_block"].colour == LOOKS["pbs"].colour
    assert look_of_settings({"name": "pbs", "order": "greedy"}) == ORDER_LOOKS["greedy"]
    assert look_of_settings({"name": "pbs", "order": "last_block", "gqa": "shared"}) == SHARED_LOOK
    assert set(ORDER_LOOKS) <= set(ORDERS.names)
    own = [look for name, look in ORDER_LOOKS.items() if name not in ("none", "last_block")]
    for first, second in combinations([*LOOKS.values(), *own, SHARED_LOOK], 2):
        assert first.colour != second.colour
        distances = [distance(first.colour, second.colour, np.array(eye)) for eye in EYES]
        assert min(distances) > 0.06, (first, second)


def test_unknown_methods_keep_their_look():
    look = look_of("my_method")
    assert look == look_of("my_method")
    assert look.label == "my_method"
    assert look.colour not in {known.colour for known in LOOKS.values()}


def test_accuracy_density_shows_every_run(tmp_path, figures):
    path = draw_accuracy_density(runs(), tmp_path / "deep" / "picture.png")
    image = imread(path)
    assert image.shape[0] >= 500
    assert image.shape[1] >= 700
    for method in ("flash", "pbs", "meanpool", "my_method"):
        near = np.abs(image[..., :3] - np.array(to_rgb(look_of(method).colour))).max(-1) < 0.02
        assert near.sum() > 60, method
    words = texts(figures[0])
    assert "Accuracy against density: tiny, needle, lengths 1024-8192, 40 samples a run" in words
    assert {"PBS", "MeanPooling", "dense (flash)", "my_method"} <= set(words)
    assert {"τ=0.5", "τ=0.7", "τ=0.9"} <= set(words)


def test_labels_do_not_overlap(tmp_path, figures):
    crowded = pd.concat([runs(), runs().assign(method="prism", density=lambda f: f.density + 0.02)])
    draw_accuracy_density(crowded, tmp_path / "picture.png")
    figure = figures[0]
    renderer = figure.canvas.get_renderer()
    boxes = [Text.get_window_extent(text, renderer) for text in figure.axes[0].texts]
    assert len(boxes) > 8
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert all(figure.bbox.x0 < box.x0 < box.x1 < figure.bbox.x1 for box in boxes)


def test_many_swept_methods_keep_their_names_and_lose_their_settings(tmp_path, figures):
    points = [
        {"method": method, "setting": f"τ={density:.3f}", "density": density, "num_samples": 50}
        | {"accuracy": 0.3 + density + 0.01 * number}
        for number, method in enumerate(LOOKS)
        for density in (0.2 + 0.002 * number, 0.4 - 0.003 * number)
    ]
    draw_accuracy_density(pd.DataFrame(points), tmp_path / "picture.png")
    axes = figures[0].axes[0]
    renderer = figures[0].canvas.get_renderer()
    inside = axes.get_window_extent(renderer)
    assert len(axes.texts) >= 4
    assert not [text for text in texts(figures[0]) if text.startswith("τ")]
    for text in axes.texts:
        box = Text.get_window_extent(text, renderer)
        assert inside.y0 < box.y0 < box.y1 < inside.y1


def test_bars_are_wilson_intervals(tmp_path, figures):
    frame = pd.DataFrame([{"method": "pbs", "density": 0.4, "accuracy": 1.0, "num_samples": 10}])
    draw_accuracy_density(frame, tmp_path / "picture.png", title="one run")
    bars = [c.get_segments()[0] for c in figures[0].axes[0].collections if c.get_segments()]
    assert bars[0][:, 1] == pytest.approx([0.7224672, 1.0], abs=1e-6)
    assert "one run" in texts(figures[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop(columns=["density", "accuracy"]), "missing: density, accuracy"),
        (lambda f: f.iloc[:0], "the frame has no rows"),
        (lambda f: f.assign(accuracy=1.5), r"accuracy must lie in \[0, 1\], got 1.5 in row 0"),
        (lambda f: f.assign(accuracy=float("nan")), "accuracy must lie"),
        (lambda f: f.assign(density=0.0), "density must be above 0"),
        (lambda f: f.assign(num_samples=0), "num_samples must be at least 1"),
    ],
)
def test_frames_that_cannot_be_drawn_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        draw_accuracy_density(change(runs()), tmp_path / "picture.png")


@pytest.fixture(scope="module")
def call():
    """Queries, keys and the plans with and without the permutation."""
    q, k, _ = make_qkv(1, 3, 1, 1000, 32, structure="mixed", seed=2)
    plan = build_method("pbs", **PBS).plan(q, k)
    return q, k, plan, build_method("pbs", order="none", **PBS).plan(q, k)


def test_attention_maps_say_and_show_what_is_computed(tmp_path, figures, call):
    q, k, plan, before = call
    path = draw_attention_maps(
        q, k, plan, scale=SCALE, head=0, path=tmp_path / "m.png", title="head 0", plan_before=before
    )
    image = imread(path)
    assert image.shape[1] >= 1200
    # What is skipped is grey, over white and the palest blue.
    grey = (np.ptp(image[..., :3], axis=-1) < 0.08) & (abs(image[..., :3].mean(-1) - 0.73) < 0.06)
    assert grey[:, : image.shape[1] // 2].sum() > 2000
    assert grey[:, image.shape[1] // 2 :].sum() > 2000
    words = "\n".join(texts(figures[0]))
    for each in (before, plan):
        coverage = float(measure_coverage(q, k, each, scale=SCALE, heads=[0]))
        assert f"{float(each.density()[0, 0]):.1%} of causal tiles, {coverage:.1%}" in words
    assert "head 0 (1,000 tokens)" in words
    assert "key place in plan order (tokens)" in words
    assert "largest in each cell of 2 x 2 tokens" in words


def test_a_cut_map_says_so(tmp_path, figures, call):
    q, k, plan, _ = call
    draw_attention_maps(
        q, k, plan, scale=SCALE, head=2, path=tmp_path / "m.png", title="cut", max_tokens=300
    )
    words = texts(figures[0])
    assert "cut (first 300 of 1,000 tokens)" in words
    assert any("whole head: " in text for text in words)
    assert figures[0].axes[0].get_xlim() == (0, 300)


def view_of(q, k, head, *, stop=None):
    return map_panels.MapView(q, k, SCALE, head, stop or k.shape[2])


@pytest.mark.parametrize("num_queries", [256, 100])
def test_map_after_the_permutation_is_the_moved_map(num_queries):
    """With one token a cell: earlier segments in plan order, the own segment as it was."""
    q, k, _ = make_qkv(1, 2, 1, 256, 32, num_queries=num_queries, structure="vertical")
    plan = build_method("pbs", block_size=16, segment_size=64, threshold=0.5).plan(q, k)
    view = view_of(q, k, 1)
    assert view.cell == 1
    natural = view.weights(None)
    after = view.weights(map_panels.one_head(plan, 0, 1))
    order = plan.key_order()[0, 1].numpy()
    for row in range(0, num_queries, 7):
        # The own segment of a tile is that of its first row.
        start = (row // 16 * 16 + 256 - num_queries) // 64 * 64
        assert np.array_equal(after[row, :start], natural[row][order[:start]])
        assert np.array_equal(after[row, start:].filled(-1), natural[row, start:].filled(-1))
    assert natural.mask[0, 257 - num_queries :].all()
    assert np.allclose(after.filled(0).sum(1), 1, atol=1e-5)


def test_outlined_cells_are_the_plans_tiles():
    q, k, _ = make_qkv(1, 2, 1, 1030, 32, structure="vertical")
    plan = build_method("pbs", block_size=32, segment_size=64, threshold=0.5).plan(q, k)
    view = view_of(q, k, 1)
    cells = view.computed(map_panels.one_head(plan, 0, 1))
    per_tile = 32 // view.cell
    tiles = plan.block_mask()[0, 1].numpy().repeat(per_tile, 0).repeat(per_tile, 1)
    assert np.array_equal(cells, tiles[: cells.shape[0], : cells.shape[1]])


def test_max_pooling_keeps_single_keys_visible():
    weights = torch.zeros(10, 10)
    weights[:, 7] = 0.5
    pooled = map_panels.pool_cells(weights, 4)
    assert pooled.tolist() == [[0.0, 0.5, 0.0]] * 3


def test_dense_plans_and_cached_keys_can_be_drawn(tmp_path, figures):
    q, k, _ = make_qkv(2, 2, 1, 300, 32, num_queries=120)
    plan = build_method("flash").plan(q, k)
    path = draw_attention_maps(
        q, k, plan, scale=SCALE, head=1, path=tmp_path / "m.png", title="dense", sequence=1
    )
    assert path.stat().st_size > 10_000
    assert any("this plan moves none" in text for text in texts(figures[0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": 3}, r"head must lie in \[0, 3\), got 3"),
        ({"sequence": 1}, r"sequence must lie in \[0, 1\), got 1"),
        ({"max_tokens": 0}, "max_tokens must be above 0"),
    ],
)
def test_maps_that_cannot_be_drawn_are_refused(tmp_path, call, changes, message):
    q, k, plan, _ = call
    arguments = {"scale": SCALE, "head": 0, "path": tmp_path / "m.png", "title": "x"} | changes
    with pytest.raises(ValueError, match=message):
        draw_attention_maps(q, k, plan, **arguments)


def test_a_plan_before_that_moves_keys_is_refused(tmp_path, call):
    q, k, plan, _ = call
    with pytest.raises(ValueError, match="natural order"):
        draw_attention_maps(
            q, k, plan, scale=SCALE, head=0, path=tmp_path / "m", title="", plan_before=plan
        )


def test_the_head_with_lines_is_chosen(call):
    q, k, plan, before = call
    captured = CapturedCall(0, q, k, SCALE, plan)
    # Of the mixed heads, the first has only vertical lines, the second only slashes.
    assert choose_head(captured) == 0
    swapped = replace(captured, q=q[:, [1, 0, 1]])
    assert choose_head(swapped) == 1
    saved = before.density()[0] - plan.density()[0]
    assert choose_head(captured, before) == int(saved.argmax())
    short = replace(captured, q=q[:, [1, 0, 2], :200], k=k[:, :, :200])
    assert choose_head(short) == 1
    assert choose_head(replace(captured, q=q[:, :, :2], k=k[:, :, :2])) == 0


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def test_a_call_of_a_model_is_captured(model):
    method = build_method("pbs", block_size=16, segment_size=32, threshold=0.5)
    method.recorder = recorder = object()
    before = model.config._attn_implementation
    ids = torch.randint(50, (1, 100), generator=torch.Generator().manual_seed(0))
    captured = capture_call(model, ids, method, layer=1)
    assert (captured.layer_idx, captured.scale) == (1, 8**-0.5)
    assert (captured.q.shape, captured.k.shape) == ((1, 4, 100, 8), (1, 2, 100, 8))
    assert not captured.q.requires_grad
    assert captured.plan.ordered_keys is None
    plan = method.plan(captured.q, captured.k, scale=captured.scale)
    assert torch.equal(plan.block_mask(), captured.plan.block_mask())
    assert method.recorder is recorder
    assert model.config._attn_implementation == before
    torch.testing.assert_close(capture_call(model, ids[0], method, layer=1).q, captured.q)


def test_what_cannot_be_captured_is_refused(model):
    method = build_method("pbs", block_size=16, segment_size=32)
    with pytest.raises(ValueError, match=r"not called for layer 5, only for \[0, 1\]"):
        capture_call(model, torch.zeros(1, 50, dtype=torch.long), method, layer=5)
    assert method.recorder is None
    for shape in [(2, 50), (1, 1), (1, 2, 3)]:
        with pytest.raises(ValueError, match="one prompt of two or more tokens"):
            capture_call(model, torch.zeros(shape, dtype=torch.long), method, layer=0)


def test_a_gallery_shows_every_head_before_and_after(tmp_path, figures, call):
    q, k, plan, before = call
    draw_map_gallery(
        q,
        k,
        plan,
        scale=SCALE,
        heads=[2, 0],
        path=tmp_path / "g.png",
        title="t",
        plan_before=before,
    )
    words = texts(figures[0])
    headings = [text for text in words if text.startswith("head ")]
    assert [text.split("\n")[0] for text in headings] == [
        "head 2, before",
        "head 0, before",
        "head 2, after",
        "head 0, after",
    ]
    share = f"{float(plan.density()[0, 2]):.1%} of tiles"
    assert share in headings[2]
    coverage = measure_coverage(q, k, plan, scale=SCALE)[0, 2]
    assert f"{float(coverage):.1%} of attention" in headings[2]


def test_a_gallery_of_a_method_that_moves_nothing_has_one_map_a_head(tmp_path, figures, call):
    q, k, _, before = call
    path = tmp_path / "g.png"
    draw_map_gallery(q, k, before, scale=SCALE, heads=[0, 1, 2], path=path, title="t")
    headings = [text for text in texts(figures[0]) if text.startswith("head ")]
    assert [text.split("\n")[0] for text in headings] == ["head 0", "head 1", "head 2"]


def test_a_gallery_breaks_its_rows(tmp_path, figures, call):
    q, k, plan, _ = call
    path = tmp_path / "g.png"
    draw_map_gallery(q, k, plan, scale=SCALE, heads=[0, 1, 2, 0, 1], path=path, title="t")
    assert sum(axes.axison for axes in figures[0].axes) == 10 + 1  # maps, and the bar of colours
    with pytest.raises(ValueError, match="no heads"):
        draw_map_gallery(q, k, plan, scale=SCALE, heads=[], path=path, title="t")


def test_heads_for_a_gallery_go_from_most_to_least_saved(call):
    _, _, plan, before = call
    saved = before.density()[0] - plan.density()[0]
    expected = saved.argsort(descending=True, stable=True).tolist()
    assert choose_heads(plan, before, 3) == choose_heads(plan, before, 9) == expected
    assert choose_heads(plan, before, 2) == [expected[0], expected[-1]]
    densest = plan.density()[0].argsort(descending=True, stable=True).tolist()
    assert choose_heads(plan, None, 3) == densest

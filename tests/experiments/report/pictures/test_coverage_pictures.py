"""Pictures of coverage: every curve, length and head is there, and words do not collide."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from experiments.report.pictures.coverage_curves import Curve, draw_coverage_density, line_of
from experiments.report.pictures.density_length import Series, draw_density_length, format_length
from experiments.report.pictures.head_changes import draw_head_changes, draw_head_shares
from experiments.report.pictures.looks import LOOKS, ORDER_LOOKS, Percent


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
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def points(shift=0.0, *, target=None, own_value=0.9):
    density = np.array([0.2, 0.4, 0.7, 1.0])
    return pd.DataFrame(
        {
            "is_own": [False, True, False, False],
            "value": [0.5, own_value, 0.95, 1.0],
            "target": [target, None, target, target],
            "density": density,
            "coverage": np.minimum(1.0, density**0.2 + shift),
        }
    ).astype({"target": float, "value": float})


def curves():
    return [
        Curve(look.label, look, points(0.01 * number))
        for number, look in enumerate(ORDER_LOOKS.values())
    ]


def test_every_curve_is_in_the_legend_and_in_the_savings(tmp_path, figures):
    drawn = curves()
    path = draw_coverage_density(
        drawn, tmp_path / "c.png", title="a title", note="a note", reference=drawn[0]
    )
    assert path.stat().st_size > 20_000
    words = texts(figures[0])
    assert {"a title", "a note", "against: no permutation"} <= set(words)
    assert {curve.label for curve in drawn} <= set(words)
    savings = {line.get_color(): line for line in figures[0].axes[1].lines}
    assert set(savings) == {curve.look.colour for curve in drawn}
    assert np.allclose(savings[drawn[0].look.colour].get_ydata(), 0)
    assert savings[drawn[3].look.colour].get_ydata()[100] > 0


def test_savings_are_the_density_between_curves_at_equal_coverage(tmp_path, figures):
    better = points()
    better["density"] *= 0.9
    drawn = [Curve("a", LOOKS["meanpool"], points()), Curve("b", LOOKS["pbs"], better)]
    draw_coverage_density(drawn, tmp_path / "c.png", title="t", reference=drawn[0])
    line = figures[0].axes[1].lines[1]
    place = np.abs(line.get_xdata() - 0.4**0.2).argmin()
    assert line.get_ydata()[place] == pytest.approx(0.04, abs=1e-3)


def test_curves_of_one_colour_have_different_dashes(tmp_path, figures):
    drawn = [Curve(name, LOOKS["pbs"], points(shift)) for name, shift in (("a", 0), ("b", 0.05))]
    draw_coverage_density(drawn, tmp_path / "c.png", title="t")
    assert len(figures[0].axes) == 1
    styles = [
        line.get_linestyle() for line in figures[0].axes[0].lines if len(line.get_xdata()) > 1
    ]
    assert len(styles) == len(set(map(str, styles))) == 2


def test_an_own_setting_of_another_kind_stands_beside_the_line():
    assert len(line_of(points())) == 4
    assert len(line_of(points(target=0.3))) == 3
    assert len(line_of(points(own_value=None))) == 3
    alone = points(own_value=None)[1:2]
    assert len(line_of(alone)) == 1, "nothing else to draw"


@pytest.mark.parametrize("count", [1, 9])
def test_legend_and_labels_do_not_collide(tmp_path, figures, count):
    drawn = [
        Curve(f"pbs order=random_query number {number}", LOOKS["pbs"], points())
        for number in range(count)
    ]
    draw_coverage_density(drawn, tmp_path / "c.png", title="word " * 40, note="note " * 30)
    figure = figures[0]
    renderer = figure.canvas.get_renderer()
    boxes = [
        figure._suptitle.get_window_extent(renderer),
        figure.legends[0].get_window_extent(renderer),
        figure.axes[0].get_tightbbox(renderer),
    ]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_no_curves_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no curves"):
        draw_coverage_density([], tmp_path / "c.png", title="t")


def test_lengths_of_ours_and_of_the_paper_are_drawn(tmp_path, figures):
    ours = pd.DataFrame({"length": [1024, 2048], "density": [0.9, 0.8], "coverage": [0.99, 0.97]})
    series = [
        Series("without", LOOKS["meanpool"], ours, {8192: 0.65, 16384: 0.54}),
        Series("with", LOOKS["pbs"], ours.assign(density=[0.8, 0.6])),
    ]
    draw_density_length(series, tmp_path / "d.png", title="t", published="paper")
    left, right = figures[0].axes
    assert [len(line.get_xdata()) for line in left.lines] == [2, 2, 2]
    assert [label.get_text() for label in left.get_xticklabels()] == ["1K", "2K", "8K", "16K"]
    assert [label.get_text() for label in right.get_xticklabels()] == ["1K", "2K"]
    assert {"without", "without, paper", "with"} <= set(texts(figures[0]))
    assert right.get_ylim()[0] < 0.97


@pytest.mark.parametrize(("tokens", "text"), [(512, "512"), (1024, "1K"), (1500, "1,500")])
def test_lengths_are_short_words(tokens, text):
    assert format_length(tokens) == text


def test_nothing_to_draw_is_refused(tmp_path):
    empty = pd.DataFrame({"length": [], "density": [], "coverage": []})
    with pytest.raises(ValueError, match="at least one length"):
        draw_density_length([Series("a", LOOKS["pbs"], empty)], tmp_path / "d.png", title="t")
    for draw in (
        lambda frame: draw_head_changes(frame, {}, tmp_path / "h.png", title="t"),
        lambda frame: draw_head_shares(frame, tmp_path / "h.png", title="t"),
    ):
        with pytest.raises(ValueError, match="no heads"):
            draw(pd.DataFrame({"layer": [], "head": [], "change": []}))


def heads(layers, count):
    frame = pd.MultiIndex.from_product([range(layers), range(count)], names=["layer", "head"])
    frame = frame.to_frame(index=False)
    spread = np.linspace(-0.4, 0.1, len(frame))
    return frame.assign(change=spread, density=0.5 + spread, coverage=0.9 + spread / 5)


SHARES = {
    "ours": {"helped": 0.8, "unchanged": 0.0, "harmed": 0.2},
    "paper": {"helped": 0.708, "unchanged": 0.24, "harmed": 0.052},
}


def test_heads_and_shares_are_written_where_there_is_room(tmp_path, figures):
    draw_head_changes(heads(2, 4), SHARES, tmp_path / "h.png", title="t")
    words = texts(figures[0])
    assert {"-40.0", "+10.0", "80.0%", "24.0%", "5.2%", "helped", "harmed"} <= set(words)
    assert "0.0%" not in words
    draw_head_changes(heads(32, 32), SHARES, tmp_path / "h.png", title="t")
    assert "-40.0" not in texts(figures[1])


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0.99, 0.992, 0.994], ["99.0%", "99.2%", "99.4%"]),
        ([0.0, 0.025, 0.05], ["0.0%", "2.5%", "5.0%"]),
        ([0.2, 0.4], ["20%", "40%"]),
    ],
)
def test_ticks_have_the_decimals_that_their_steps_need(values, labels):
    """They were "100 100 100 99 99 99 99 %", and steps of 2.5 were rounded."""
    axis = Figure().subplots().yaxis
    axis.set_major_formatter(Percent())
    assert axis.get_major_formatter().format_ticks(values) == labels


def test_no_two_ticks_of_a_colour_bar_say_the_same(tmp_path, figures):
    frame = heads(2, 3)
    frame["coverage"] = 0.9901 + frame["head"] * 0.001
    draw_head_shares(frame, tmp_path / "h.png", title="t")
    for axes in figures[0].axes:
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert len(set(labels)) == len(labels)


def test_a_pdf_lies_beside_each_png_and_equal_pictures_are_equal_files(tmp_path):
    for name in ("a", "b"):
        draw_head_shares(heads(2, 3), tmp_path / f"{name}.png", title="t")
    for suffix in (".png", ".pdf"):
        first, second = ((tmp_path / name).with_suffix(suffix).read_bytes() for name in "ab")
        assert first == second


def test_density_and_coverage_of_heads_have_a_map_each(tmp_path, figures):
    draw_head_shares(heads(2, 3), tmp_path / "h.png", title="t")
    images = [axes.images[0] for axes in figures[0].axes if axes.images]
    assert [image.get_array().shape for image in images] == [(2, 3), (2, 3)]
    assert figures[0].axes[0].get_xlabel() == "query head"


def test_chosen_layers_and_heads_keep_their_numbers(tmp_path, figures):
    frame = heads(2, 2).replace({"layer": {1: 7}, "head": {0: 3, 1: 30}})
    draw_head_shares(frame, tmp_path / "h.png", title="t")
    axes = figures[0].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["3", "30"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "7"]

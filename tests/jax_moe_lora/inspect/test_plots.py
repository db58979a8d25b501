"""Figures show the arrays that they were given, under labels that say what is seen."""

import sys
from itertools import pairwise

import numpy as np
import pytest

from jax_moe_lora import InputError, plots
from jax_moe_lora.inspect import coactivation, expert_load

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def _no_display():
    matplotlib.use("Agg")
    yield
    plots.pyplot().close("all")


def cells(axis):
    """The coloured cells of a heatmap."""
    (mesh,) = axis.collections
    return mesh


def test_without_matplotlib_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"Plots need matplotlib; install jax-moe-lora\[plots\]\."):
        plots.heatmaps({"a": np.zeros((1, 1))}, "r", "c", title="", label="")


def test_heatmaps_share_one_scale_and_write_the_numbers():
    panels = {"one": np.array([[0.0, 1.0], [2.0, 3.0]]), "two": np.array([[-7.0, 1.0], [0.0, 0.0]])}
    axes = plots.heatmaps(panels, ["a", "b"], ["c", "d"], title="what", label="unit", diverging=True, digits=1)
    for axis, values in zip(axes, panels.values(), strict=True):
        np.testing.assert_array_equal(cells(axis).get_array(), values)
        assert cells(axis).get_clim() == (-7, 7)
    assert [text.get_text() for text in axes[0].texts] == ["0.0", "1.0", "2.0", "3.0"]
    assert [axis.get_title() for axis in axes] == ["one", "two"]
    (axis,) = plots.heatmaps({"": np.array([[-3.0, np.nan, -0.1]])}, "r", "cde", title="", label="", digits=0)
    assert [text.get_text() for text in axis.texts] == ["-3", "0"]
    assert cells(axis).get_clim() == (-3, -0.1)
    with pytest.raises(InputError, match=r"Panel 'one' has shape \[2, 2\]; expected \[2, 3\]"):
        plots.heatmaps(panels, ["a", "b"], "cde", title="", label="")


def test_the_first_row_of_a_heatmap_is_on_top_and_no_cell_is_cut_off():
    (axis,) = plots.heatmaps({"": np.eye(3)[:2]}, "ab", "xyz", title="", label="")
    assert axis.get_ylim() == (1.5, -0.5)
    assert axis.get_xlim() == (-0.5, 2.5)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]


def test_the_labels_of_many_experts_do_not_overlap():
    (axis,) = plots.expert_load({"base": np.full((2, 128), 1 / 128)})
    axis.figure.canvas.draw()
    boxes = [label.get_window_extent() for label in axis.get_xticklabels()]
    assert len(boxes) > 20
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    assert not axis.texts  # 128 numbers in a row cannot be read
    assert axis.figure.get_size_inches()[0] < 13


def test_expert_load_and_coactivation_are_drawn_in_per_cent():
    experts = np.array([[[[0, 1], [0, 2]]]], np.int32)
    (axis,) = plots.expert_load({"base": expert_load(experts, 3)}, layers=[7])
    np.testing.assert_allclose(cells(axis).get_array(), [[50, 25, 25]])
    assert [label.get_text() for label in axis.get_yticklabels()] == ["7"]
    (axis,) = plots.coactivation(coactivation(experts, 3), layers=np.array([7]))
    np.testing.assert_allclose(cells(axis).get_array(), [[0, 50, 50], [100, 0, 0], [100, 0, 0]])


def test_lines_draw_each_series_and_its_floor_in_one_colour():
    x, ys = [1, 8, 64], {"here": [3.0, 4.0, 5.0], "there": [1.0, np.nan, 2.0]}
    axes = plots.lines(x, ys, title="t", xlabel="tokens", ylabel="µs", floor={"there": [1, 1, 1]}, logx=True, logy=True)
    here, there, floor, _ = axes.get_lines()
    np.testing.assert_array_equal(here.get_ydata(), ys["here"])
    np.testing.assert_array_equal(there.get_ydata(), ys["there"])
    assert floor.get_color() == there.get_color() != here.get_color()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["here", "there", "floor"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "8", "64"]
    assert plots.lines(x, ys, title="", xlabel="", ylabel="", axes=axes) is axes


def test_parity_draws_a_point_per_probe_and_a_line_per_tolerance():
    errors = {"float32": [0.0, 1e-7], "bfloat16": [1e-3, 2e-3]}
    axes = plots.parity(errors, ["none", "gate"], {"float32": 1e-5, "bfloat16": 1e-2})
    points, limit, points16, limit16, _ = axes.get_lines()
    assert points.get_xdata().tolist() == [1e-9, 1e-7]
    assert points16.get_xdata().tolist() == errors["bfloat16"]
    assert (limit.get_xdata()[0], limit16.get_xdata()[0]) == (1e-5, 1e-2)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["none", "gate"]


def test_every_figure_is_drawn_at_150_dots_per_inch(tmp_path):
    (heatmap,) = plots.heatmaps({"": np.eye(2)}, "ab", "cd", title="", label="")
    curves = plots.lines([0, 1], {"a": [0, 1]}, title="", xlabel="", ylabel="")
    errors = plots.parity({"float32": [1e-7]}, ["none"], {"float32": 1e-5})
    for axis in (heatmap, curves, errors):
        assert axis.figure.dpi == 150
    curves.figure.savefig(tmp_path / "curves.png")
    width, _ = np.array(curves.figure.get_size_inches()) * 150
    assert plots.pyplot().imread(tmp_path / "curves.png").shape[1] == int(width)

"""Figures show the arrays that they were given, under labels that say what is seen."""

import sys

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


def test_without_matplotlib_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"Plots need matplotlib; install jax-moe-lora\[plots\]\."):
        plots.heatmaps({"a": np.zeros((1, 1))}, "r", "c", title="", label="")


def test_heatmaps_share_one_scale_and_write_the_numbers():
    panels = {"one": np.array([[0.0, 1.0], [2.0, 3.0]]), "two": np.array([[-7.0, 1.0], [0.0, 0.0]])}
    axes = plots.heatmaps(panels, ["a", "b"], ["c", "d"], title="what", label="unit", diverging=True, digits=1)
    images = [axis.images[0] for axis in axes]
    for image, values in zip(images, panels.values(), strict=True):
        np.testing.assert_array_equal(image.get_array(), values)
        assert image.get_clim() == (-7, 7)
    assert [text.get_text() for text in axes[0].texts] == ["0.0", "1.0", "2.0", "3.0"]
    assert [axis.get_title() for axis in axes] == ["one", "two"]
    (axis,) = plots.heatmaps({"": np.array([[-3.0, np.nan, -0.1]])}, "r", "cde", title="", label="", digits=0)
    assert [text.get_text() for text in axis.texts] == ["-3", "0"]
    assert axis.images[0].get_clim() == (-3, -0.1)
    with pytest.raises(InputError, match=r"one is \[2, 2\]; 2 rows and 3 columns are named"):
        plots.heatmaps(panels, ["a", "b"], "cde", title="", label="")


def test_expert_load_and_coactivation_are_drawn_in_per_cent():
    experts = np.array([[[[0, 1], [0, 2]]]], np.int32)
    (axis,) = plots.expert_load({"base": expert_load(experts, 3)}, layers=[7])
    np.testing.assert_allclose(axis.images[0].get_array(), [[50, 25, 25]])
    assert [label.get_text() for label in axis.get_yticklabels()] == ["7"]
    (axis,) = plots.coactivation(coactivation(experts, 3), layers=[7])
    np.testing.assert_allclose(axis.images[0].get_array(), [[0, 50, 50], [100, 0, 0], [100, 0, 0]])


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


def test_parity_draws_a_point_a_probe_and_a_line_a_tolerance():
    errors = {"float32": [0.0, 1e-7], "bfloat16": [1e-3, 2e-3]}
    axes = plots.parity(errors, ["none", "gate"], {"float32": 1e-5, "bfloat16": 1e-2})
    points, limit, points16, limit16, _ = axes.get_lines()
    assert points.get_xdata().tolist() == [1e-9, 1e-7]
    assert points16.get_xdata().tolist() == errors["bfloat16"]
    assert (limit.get_xdata()[0], limit16.get_xdata()[0]) == (1e-5, 1e-2)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["none", "gate"]

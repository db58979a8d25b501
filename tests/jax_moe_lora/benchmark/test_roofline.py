"""The roofline figure shows every measured cell, each set of adapters in its own colour."""

import pytest

from jax_moe_lora.benchmark.roofline import roofline, save_roofline
from jax_moe_lora.inspect.style import LOOKS

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def _no_display():
    matplotlib.use("Agg")
    yield
    matplotlib.pyplot.close("all")


def row(shape, adapters, tokens, layer_us, floor_us, engine="jax_moe_lora"):
    cell = {"shape": shape, "adapters": adapters, "tokens": tokens, "engine": engine}
    return cell | {"layer_us": layer_us, "floor_us": floor_us}


ROWS = [
    row("olmoe", "none", 1, 40.0, 20.0),
    row("olmoe", "none", 2048, 400.0, 300.0),
    row("olmoe", "s8r16", 1, 50.0, 20.0),
    row("mixtral-8x7b", "none", 8, 700.0, 756.0),
]


def test_no_point_is_cut_off_where_a_layer_beats_its_floor():
    figure = roofline(ROWS, "device, date")
    drawn = 0
    for axis in figure.axes:
        low, high = axis.get_ylim()
        for line in axis.get_lines():
            assert all(low <= y <= high for y in line.get_ydata())
            drawn += len(line.get_ydata())
    assert drawn == 2 * 4 + 4 + 2 * 2  # times and shares, floors, a line at 1 per shape
    assert figure.axes[2].get_ylim()[1] > 756 / 700


def test_colours_follow_the_set_of_adapters_whatever_comes_first():
    for rows in (ROWS, ROWS[::-1]):
        figure = roofline(rows, "")
        labels = {key.get_label(): key.get_color() for key in figure.legends[0].legend_handles}
        assert labels["none"] == LOOKS["none"].color
        assert labels["s8r16"] == LOOKS["s8r16"].color


def test_several_engines_are_told_apart_by_markers():
    figure = roofline([*ROWS, row("olmoe", "none", 1, 90.0, 20.0, "tokamax")], "")
    markers = {key.get_label(): key.get_marker() for key in figure.legends[0].legend_handles}
    assert (markers["jax_moe_lora"], markers["tokamax"]) == (LOOKS["jax_moe_lora"].marker, LOOKS["tokamax"].marker)
    assert markers["none"] in ("", "None")


def test_the_file_is_crisp(tmp_path):
    save_roofline(ROWS, "", tmp_path / "out.png")
    height, _, _ = matplotlib.pyplot.imread(tmp_path / "out.png").shape
    assert height == int(5.6 * 150)

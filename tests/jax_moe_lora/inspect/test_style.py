"""A colour means one thing in every figure."""

import sys
from types import SimpleNamespace

import pytest

from jax_moe_lora import plots
from jax_moe_lora.benchmark.peers import PEERS
from jax_moe_lora.demo.tasks import TASKS
from jax_moe_lora.inspect.style import LOOKS, SPARE, looks
from pallas_kernels.specs import ADAPTERS

SAME = {"none": "base", "jax_moe_lora[hopper]": "jax_moe_lora"}  # two names of one thing


def test_no_two_things_have_one_colour():
    for name, other in SAME.items():
        assert LOOKS[name] == LOOKS[other]
    colors = [look.color for name, look in LOOKS.items() if name not in SAME] + [look.color for look in SPARE]
    assert len(set(colors)) == len(colors)


@pytest.mark.parametrize(
    "names", [TASKS, ADAPTERS, [peer.name for peer in PEERS.values()]], ids=["demo", "sets", "peers"]
)
def test_what_the_notebooks_and_benchmarks_draw_has_its_own_colour_and_marker(names):
    assert set(names) <= set(LOOKS)
    assert len(set(looks(names).values())) == len(set(names))


def test_a_look_does_not_depend_on_the_other_names_of_the_figure():
    assert looks(["upper", "shift"])["shift"] == looks(["shift"])["shift"] == looks(["mine", "shift"])["shift"]
    assert looks(["mine", "base", "yours", "mine"]) == {"mine": SPARE[0], "base": LOOKS["base"], "yours": SPARE[1]}


def test_curves_keep_their_colour_from_figure_to_figure():
    pytest.importorskip("matplotlib").use("Agg")
    first = plots.lines([0, 1], {"reverse": [0, 1], "upper": [1, 2]}, title="", xlabel="", ylabel="")
    second = plots.lines([0, 1], {"upper": [0, 1], "reverse": [1, 2]}, title="", xlabel="", ylabel="")
    colors = [{line.get_label(): line.get_color() for line in axes.get_lines()} for axes in (first, second)]
    assert colors[0] == colors[1] == {name: LOOKS[name].color for name in ("reverse", "upper")}
    plots.pyplot().close("all")


def test_outside_a_notebook_svg_changes_nothing(monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    plots.pyplot()
    before = dict(matplotlib.rcParams)
    for outside in (None, SimpleNamespace(get_ipython=lambda: None)):  # not imported, or imported by a plain script
        monkeypatch.setitem(sys.modules, "IPython", outside)
        plots.show_as_svg()
        assert dict(matplotlib.rcParams) == before

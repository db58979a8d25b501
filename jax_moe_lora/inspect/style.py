"""How every figure looks: its resolution, its format in a notebook, and one colour and marker per thing.

Needs the `plots` extra. The colours are from palettes that colour-blind readers can tell apart (Okabe and Ito; Tol).
"""

import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from jax_moe_lora.errors import InputError

DPI = 150


class Look(NamedTuple):
    """The colour and marker of one thing, as matplotlib spells them."""

    color: str
    marker: str


LOOKS = {
    # The base model, or a layer without adapters.
    "base": Look("#000000", "o"),
    "none": Look("#000000", "o"),
    # The demo's adapters.
    "reverse": Look("#0072B2", "s"),
    "shift": Look("#E69F00", "^"),
    "sort": Look("#009E73", "D"),
    "upper": Look("#CC79A7", "v"),
    # The benchmark's adapter sets.
    "s1r16": Look("#88CCEE", "s"),
    "s8r16": Look("#332288", "^"),
    "s8r64": Look("#882255", "D"),
    "s32r16": Look("#117733", "v"),
    "mixed": Look("#DDCC77", "P"),
    # This library and the engines that are measured beside it.
    "jax_moe_lora": Look("#D55E00", "o"),
    "jax_moe_lora[hopper]": Look("#D55E00", "o"),
    "jax_moe_lora[portable]": Look("#661100", "P"),
    "jax_moe_lora[xla]": Look("#999933", "s"),
    "jax.lax.ragged_dot": Look("#44AA99", "^"),
    "tokamax": Look("#6699CC", "X"),
    "torch-grouped_mm": Look("#AA4499", "D"),
    "transformers-grouped_mm": Look("#7F7F7F", "v"),
    # Dtypes.
    "float32": Look("#004488", "o"),
    "float16": Look("#DDAA33", "s"),
    "bfloat16": Look("#BB5566", "^"),
}
"""Name -> look, the same in every figure and notebook."""

SPARE = (
    Look("#56B4E9", "<"),
    Look("#CC6677", ">"),
    Look("#4477AA", "X"),
    Look("#228833", "h"),
    Look("#AA3377", "p"),
    Look("#BBBBBB", "*"),
)
"""Looks of names that `LOOKS` does not have, in the order in which a figure names them."""


def looks(names: Iterable[str]) -> dict[str, Look]:
    """The look of each name.

    Args:
      names: the things that one figure shows.

    Returns:
      name -> its look of `LOOKS`, or the next spare one; spare looks repeat after `len(SPARE)` names.
    """
    chosen: dict[str, Look] = {}
    spare = 0
    for name in dict.fromkeys(names):
        if name in LOOKS:
            chosen[name] = LOOKS[name]
        else:
            chosen[name] = SPARE[spare % len(SPARE)]
            spare += 1
    return chosen


def pyplot() -> Any:
    """matplotlib's pyplot.

    Raises:
      InputError: matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise InputError("Plots need matplotlib; install jax-moe-lora[plots].") from error
    return pyplot


def subplots(*shape: int, **options: Any) -> tuple[Any, Any]:
    """`pyplot.subplots` at the resolution and with the layout of every figure.

    Args:
      shape: number of rows and of columns; 1 and 1 if not given.
      options: those of `pyplot.subplots`.

    Returns:
      The figure and its axes.
    """
    return pyplot().subplots(*shape, dpi=DPI, layout="constrained", **options)


def show_as_svg() -> None:
    """From here on a notebook shows its figures as SVG, which is sharp at every size.

    Drawing the same figure again gives the same bytes. Outside a notebook nothing changes.

    Raises:
      InputError: matplotlib is not installed.
    """
    parameters = pyplot().rcParams
    ipython = sys.modules.get("IPython")
    if ipython is None or ipython.get_ipython() is None:
        return
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    parameters["svg.hashsalt"] = "jax_moe_lora"
    set_matplotlib_formats("svg", metadata={"Date": None})

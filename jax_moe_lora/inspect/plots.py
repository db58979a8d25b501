"""Figures of arrays, such as those that `jax_moe_lora.inspect` and the benchmarks return. Needs the `plots` extra.

Every function takes arrays and returns matplotlib's axes, to which a caller may add. `style.py` says how figures look.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jax_moe_lora.errors import InputError
from jax_moe_lora.inspect.style import looks, subplots

Names = Sequence[Any]
MANY_CELLS = 2048  # from here on a heatmap is an image: vector cells would make a large file
MOST_POINTS = 32  # markers on a curve


def heatmaps(
    panels: Mapping[str, Float[np.ndarray, "N M"]],
    rows: Names,
    columns: Names,
    *,
    title: str,
    label: str,
    xlabel: str = "",
    ylabel: str = "",
    diverging: bool = False,
    digits: int | None = None,
) -> Any:
    """Matrices side by side on one colour scale.

    Args:
      panels: title of the panel -> `[N, M]`; NaN leaves a cell empty.
      rows: the N names along the vertical axis.
      columns: the M names along the horizontal axis; where they would overlap, only every second or third is written.
      title: what the figure shows.
      label: what a colour means, with its unit.
      xlabel: what the columns are.
      ylabel: what the rows are.
      diverging: zero is white, and the scale is symmetric about it.
      digits: decimals of the numbers written into the cells; None writes none.

    Returns:
      The panels' axes, an array `[panels]`.

    Raises:
      InputError: a panel is not N x M, or matplotlib is not installed.
    """
    values = {name: np.asarray(array, np.float64) for name, array in panels.items()}
    for name, array in values.items():
        if array.shape != (len(rows), len(columns)):
            raise InputError(
                f"Panel {name!r} has shape {list(array.shape)}; expected [{len(rows)}, {len(columns)}], "
                "the numbers of row and column names."
            )
    top = max(np.nanmax(np.abs(array) if diverging else array) for array in values.values())
    low = -top if diverging else min(np.nanmin(array) for array in values.values())
    scale = {"cmap": "PuOr_r" if diverging else "cividis", "vmin": low, "vmax": top}
    cell = 0.42 if digits is not None else min(0.2, 10 / len(columns))  # inches
    width = max(2.2, cell * len(columns))
    size = (1.6 + len(values) * (width + 0.25), 1.3 + max(0.9, 0.3 * len(rows)))
    figure, axes = subplots(1, len(values), figsize=size, squeeze=False, sharex=True, sharey=True)
    every = math.ceil(0.085 * max(len(str(name)) for name in columns) * len(columns) / width)
    for axis, (name, array) in zip(axes[0], values.items(), strict=True):
        image = _cells(axis, array, scale)
        axis.set_title(name if len(values) > 1 else "", fontsize=10)
        axis.set_xlabel(xlabel)
        axis.set_xticks(range(0, len(columns), every), [str(name) for name in columns[::every]], fontsize=8)
        axis.set_yticks(range(len(rows)), rows)
        if digits is not None:
            _write(axis, image, array, digits)
    axes[0, 0].set_ylabel(ylabel)
    figure.suptitle(title, fontsize=11)
    figure.colorbar(image, ax=axes, label=label, fraction=0.12 / len(values), pad=0.03 / len(values))
    return axes[0]


def _cells(axis: Any, values: Float[np.ndarray, "N M"], scale: dict[str, Any]) -> Any:
    """A coloured cell per value, centred on its row and column number; the first row is on top."""
    count, width = values.shape
    many = values.size >= MANY_CELLS
    lines = {} if many else {"edgecolors": "white", "linewidth": 0.5}
    mesh = axis.pcolormesh(
        np.arange(width + 1) - 0.5, np.arange(count + 1) - 0.5, values, rasterized=many, **scale, **lines
    )
    axis.set_ylim(count - 0.5, -0.5)
    return mesh


def _write(axis: Any, image: Any, values: Float[np.ndarray, "N M"], digits: int) -> None:
    """Writes the numbers into a heatmap: black on light cells, white on dark ones."""
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        red, green, blue, _ = image.cmap(image.norm(value))
        color = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
        axis.text(
            column, row, f"{round(value, digits) + 0.0:.{digits}f}", ha="center", va="center", color=color, fontsize=7
        )


def lines(
    x: Float[np.ndarray, "N"],
    series: Mapping[str, Float[np.ndarray, "N"]],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    floor: Mapping[str, Float[np.ndarray, "N"]] | None = None,
    logx: bool = False,
    logy: bool = False,
    axes: Any = None,
) -> Any:
    """Curves over one x.

    Args:
      x: `[N]`.
      series: name -> `[N]`; NaN leaves a gap. Colour and marker follow from the name.
      title: what the figure shows.
      xlabel: what x is, with its unit.
      ylabel: what the curves are, with their unit.
      floor: name of a series -> `[N]`, drawn as a dotted line in that series' colour.
      logx: the horizontal axis is logarithmic to base 2, with a tick at every x.
      logy: the vertical axis is logarithmic.
      axes: the axes to draw into; None makes new ones.

    Returns:
      The axes.

    Raises:
      InputError: matplotlib is not installed.
    """
    if axes is None:
        _, axes = subplots(figsize=(7.2, 3.4))
    x = np.asarray(x)
    for name, (color, marker) in looks(series).items():
        look = {"color": color, "marker": marker, "ms": 4.5, "lw": 1.4, "markevery": math.ceil(len(x) / MOST_POINTS)}
        axes.plot(x, series[name], label=name, **look)
        if floor and name in floor:
            axes.plot(x, floor[name], color=color, ls=":")
    if floor:
        axes.plot([], [], color="0.3", ls=":", label="floor")
    if logx:
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [str(value) for value in x])
        axes.minorticks_off()
    if logy:
        axes.set_yscale("log")
    axes.set_title(title, fontsize=11)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return axes


def expert_load(loads: Mapping[str, Float[np.ndarray, "L E"]], layers: Names | None = None) -> Any:
    """Load of each layer's experts under several routings, in per cent of the layer's routed pairs.

    Args:
      loads: title of the panel -> what `inspect.expert_load` returns.
      layers: the L layers' numbers; None is 0 to L-1.

    Returns:
      The panels' axes, an array `[panels]`.

    Raises:
      InputError: the loads differ in shape, or matplotlib is not installed.
    """
    count, experts = next(iter(loads.values())).shape
    return heatmaps(
        {name: 100 * load for name, load in loads.items()},
        range(count) if layers is None else layers,
        range(experts),
        title=f"Load of each expert (even: {100 / experts:.3g} %)",
        label="% of routed pairs",
        xlabel="expert",
        ylabel="layer",
        digits=_digits(experts),
    )


def coactivation(together: Float[np.ndarray, "L E E"], layers: Names | None = None) -> Any:
    """How often expert j is chosen together with expert i, a panel per layer; the diagonal is left at zero.

    Args:
      together: what `inspect.coactivation` returns.
      layers: the L layers' numbers; None is 0 to L-1.

    Returns:
      The panels' axes, an array `[L]`.

    Raises:
      InputError: matplotlib is not installed.
    """
    together = np.asarray(together, np.float64)
    count, experts, _ = together.shape
    chosen = together.diagonal(axis1=1, axis2=2)[:, :, None]
    along = np.where(np.eye(experts, dtype=bool), 0.0, 100 * together / np.where(chosen > 0, chosen, 1.0))
    numbers = range(count) if layers is None else layers
    return heatmaps(
        {f"layer {number}": part for number, part in zip(numbers, along, strict=True)},
        range(experts),
        range(experts),
        title="Experts chosen together",
        label="% of the tokens of i that also choose j",
        xlabel="expert j",
        ylabel="expert i",
        digits=_digits(experts),
    )


def _digits(experts: int) -> int | None:
    """Whole numbers in the cells while these are few enough to be read."""
    return 0 if experts <= 32 else None


def parity(
    relative: Mapping[str, Float[np.ndarray, "N"]], probes: Names, tolerance: Mapping[str, float], axes: Any = None
) -> Any:
    """Relative Frobenius errors of probes, a colour per dtype; a dotted line is the dtype's tolerance.

    Args:
      relative: dtype -> `[N]`; errors below 1e-9 are drawn at 1e-9.
      probes: the N names.
      tolerance: dtype -> largest error that its rounding explains.
      axes: the axes to draw into; None makes new ones.

    Returns:
      The axes.

    Raises:
      InputError: matplotlib is not installed.
    """
    if axes is None:
        _, axes = subplots(figsize=(7.2, 0.9 + 0.27 * len(probes)))
    rows = np.arange(len(probes))
    for dtype, (color, marker) in looks(relative).items():
        axes.plot(np.maximum(relative[dtype], 1e-9), rows, ls="", marker=marker, color=color, label=dtype)
        axes.axvline(tolerance[dtype], color=color, ls=":")
    axes.plot([], [], color="0.3", ls=":", label="tolerance")
    axes.set_title("Error against the float32 reference, by probe", fontsize=11)
    axes.set(xscale="log", xlabel="relative Frobenius error")
    axes.set_yticks(rows, probes)
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="both")
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return axes

"""Figures of arrays: what `jax_moe_lora.inspect` and a benchmark give. Needs the `plots` extra.

Every function takes arrays and returns matplotlib's axes, to which a caller may add. Colours are those of Okabe and Ito
and of cividis, which colour-blind readers tell apart.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jax_moe_lora.errors import InputError

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dvx*"
Names = Sequence[Any]


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
      panels: name above the panel -> `[N, M]`; NaN leaves a cell empty. rows, columns: names along the axes, N and M.
      label: what a colour means, with its unit. diverging: zero is white, and the scale symmetric about it.
      digits: decimals of the numbers that are written into the cells; None writes none.

    Returns:
      The panels' axes, an array `[panels]`.
    """
    values = {name: np.asarray(array, np.float64) for name, array in panels.items()}
    for name, array in values.items():
        if array.shape != (len(rows), len(columns)):
            raise InputError(f"{name} is {list(array.shape)}; {len(rows)} rows and {len(columns)} columns are named.")
    top = max(np.nanmax(np.abs(array) if diverging else array) for array in values.values())
    low = -top if diverging else min(np.nanmin(array) for array in values.values())
    style = {"cmap": "PuOr_r" if diverging else "cividis", "vmin": low, "vmax": top, "aspect": "auto"}
    cell = 0.42 if digits is not None else 0.2
    width = max(2.2, cell * len(columns))
    size = (1.6 + len(values) * (width + 0.25), 1.3 + max(0.9, 0.3 * len(rows)))
    figure, axes = pyplot().subplots(
        1, len(values), figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    for axis, (name, array) in zip(axes[0], values.items(), strict=True):
        image = axis.imshow(array, **style)
        axis.set_title(name if len(values) > 1 else "", fontsize=10)
        axis.set_xlabel(xlabel)
        axis.set_xticks(range(len(columns)), columns, fontsize=8)
        axis.set_yticks(range(len(rows)), rows)
        if digits is not None:
            _write(axis, image, array, digits)
    axes[0, 0].set_ylabel(ylabel)
    figure.suptitle(title, fontsize=11)
    figure.colorbar(image, ax=axes, label=label, fraction=0.12 / len(values), pad=0.03 / len(values))
    return axes[0]


def _write(axis: Any, image: Any, values: Float[np.ndarray, "N M"], digits: int) -> None:
    """The numbers of a heatmap, in black on light cells and in white on dark ones."""
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
      x: `[N]`. series: name -> `[N]`; NaN leaves a gap. floor: name -> `[N]`, drawn dotted in its series' colour.
      logx: a base-2 axis with a tick at every x. axes: those to draw into, new ones where None.
    """
    if axes is None:
        _, axes = pyplot().subplots(figsize=(7.2, 3.4), layout="constrained")
    x = np.asarray(x)
    points = {"ms": 4} if len(x) <= 32 else {"marker": "", "lw": 1.4}
    for index, (name, values) in enumerate(series.items()):
        look: dict[str, Any] = {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}
        axes.plot(x, values, label=name, **look | points)
        if floor and name in floor:
            axes.plot(x, floor[name], color=look["color"], ls=":")
    if floor:
        axes.plot([], [], color="0.3", ls=":", label="floor")
    if logx:
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [str(value) for value in x])
        axes.minorticks_off()
    if logy:
        axes.set_yscale("log")
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return axes


def expert_load(loads: Mapping[str, Float[np.ndarray, "L E"]], layers: Names | None = None) -> Any:
    """Layer x expert load of several routings, in per cent of a layer's routed pairs.

    Args:
      loads: name -> `inspect.expert_load`. layers: their numbers, 0 to L-1 where None.
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
        digits=0,
    )


def coactivation(together: Float[np.ndarray, "L E E"], layers: Names | None = None) -> Any:
    """How often expert j comes along where expert i is chosen, a panel a layer; the diagonal is left at zero.

    Args:
      together: `inspect.coactivation`.
    """
    together = np.asarray(together, np.float64)
    count, experts, _ = together.shape
    chosen = together.diagonal(axis1=1, axis2=2)[:, :, None]
    along = np.where(np.eye(experts, dtype=bool), 0.0, 100 * together / np.where(chosen > 0, chosen, 1.0))
    return heatmaps(
        {f"layer {name}": part for name, part in zip(layers or range(count), along, strict=True)},
        range(experts),
        range(experts),
        title="Experts that are chosen together",
        label="% of the tokens of i that also choose j",
        xlabel="expert j",
        ylabel="expert i",
        digits=0,
    )


def parity(
    relative: Mapping[str, Float[np.ndarray, "N"]], probes: Names, tolerance: Mapping[str, float], axes: Any = None
) -> Any:
    """Relative Frobenius errors of probes, a colour a dtype; a line is what the dtype's rounding explains.

    Args:
      relative: dtype -> `[N]`; what is below 1e-9 is drawn there. probes: the N names. tolerance: dtype -> limit.
    """
    if axes is None:
        _, axes = pyplot().subplots(figsize=(7.2, 0.9 + 0.27 * len(probes)), layout="constrained")
    rows = np.arange(len(probes))
    for index, (dtype, errors) in enumerate(relative.items()):
        color = COLORS[index % len(COLORS)]
        axes.plot(np.maximum(errors, 1e-9), rows, ls="", marker=MARKERS[index], color=color, label=dtype)
        axes.axvline(tolerance[dtype], color=color, ls=":")
    axes.plot([], [], color="0.3", ls=":", label="tolerance")
    axes.set(xscale="log", xlabel="relative Frobenius error", title="Error against the float32 reference, by probe")
    axes.set_yticks(rows, probes)
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="both")
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return axes

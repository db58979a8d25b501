"""The roofline plot of a sweep: what was reached beside what the device allows. Needs the `plots` extra."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_moe_lora.inspect.plots import COLORS, MARKERS, pyplot


def save_roofline(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """`roofline` as a PNG at `path`, where no display is needed."""
    pyplot().switch_backend("Agg")
    figure = roofline(rows, title)
    figure.savefig(path, dpi=120)
    pyplot().close(figure)


def roofline(rows: Sequence[dict[str, Any]], title: str) -> Any:
    """Microseconds a layer over tokens beside the floor, and the part of the floor's speed; a column a shape.

    Args:
      rows: of one routing and slot distribution, as `sweep` yields them; those with an error are left out.
      title: device and date.

    Returns:
      The figure.
    """
    rows = [row for row in rows if "error" not in row]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    names = list(dict.fromkeys(row["adapters"] for row in rows))
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    size = (1.6 + 3.4 * max(len(shapes), 1), 5.6)
    figure, axes = pyplot().subplots(
        2, max(len(shapes), 1), figsize=size, squeeze=False, sharex="col", sharey="row", height_ratios=(2, 1)
    )
    for column, shape in enumerate(shapes):
        times, parts = axes[0][column], axes[1][column]
        for name in names:
            for engine in engines:
                cells = [row for row in rows if (row["shape"], row["adapters"], row["engine"]) == (shape, name, engine)]
                marker = MARKERS[engines.index(engine) % len(MARKERS)]
                _lines(times, parts, cells, COLORS[names.index(name) % len(COLORS)], marker, engine == engines[0])
        times.set(title=shape, xscale="log", yscale="log")
        times.set_xscale("log", base=2)
        ticks = sorted({row["tokens"] for row in rows if row["shape"] == shape})
        parts.set(xlabel="tokens", ylim=(0, 1.05), xticks=ticks, xticklabels=[_short(tick) for tick in ticks])
        parts.minorticks_off()
        for axis in (times, parts):
            axis.grid(alpha=0.3, which="major")
    axes[0][0].set_ylabel("microseconds a layer")
    axes[1][0].set_ylabel("floor / reached")
    keys = _keys(names, engines)
    figure.suptitle(title, fontsize=10)
    columns = min(len(keys), 2 + 2 * len(shapes))
    figure.tight_layout(rect=(0, 0.045 * -(-len(keys) // columns), 1, 1))
    figure.legend(handles=keys, loc="lower center", ncols=columns, frameon=False, fontsize=9)
    return figure


def _lines(times: Any, parts: Any, cells: list[dict[str, Any]], color: str, marker: str, with_floor: bool) -> None:
    cells = sorted(cells, key=lambda row: row["tokens"])
    tokens, reached = [row["tokens"] for row in cells], [row["layer_us"] for row in cells]
    floor = [row["floor_us"] for row in cells]
    times.plot(tokens, reached, color=color, marker=marker, ms=4)
    parts.plot(tokens, [f / r for f, r in zip(floor, reached, strict=True)], color=color, marker=marker, ms=4)
    if with_floor:
        times.plot(tokens, floor, color=color, ls=":")


def _keys(names: Sequence[str], engines: Sequence[str]) -> list[Any]:
    """Of the legend: a colour an adapter set, a marker an engine where there are several."""
    from matplotlib.lines import Line2D

    keys = [Line2D([], [], color=COLORS[index % len(COLORS)], label=name) for index, name in enumerate(names)]
    keys.append(Line2D([], [], color="0.3", ls=":", label="floor"))
    if len(engines) > 1:
        for engine, marker in zip(engines, MARKERS * len(engines), strict=False):
            keys.append(Line2D([], [], color="0.3", marker=marker, ms=4, label=engine))
    return keys


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)

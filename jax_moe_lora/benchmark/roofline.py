"""The roofline figure of a sweep: measured times beside those that the device allows. Needs the `plots` extra."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_moe_lora.benchmark.layer import ResultRow
from jax_moe_lora.inspect.style import Look, looks, pyplot, subplots


def save_roofline(rows: Sequence[ResultRow], title: str, path: Path) -> None:
    """Writes `roofline` as a PNG; needs no display.

    Args:
      rows: those of `roofline`.
      title: that of `roofline`.
      path: the file.
    """
    pyplot().switch_backend("Agg")
    figure = roofline(rows, title)
    figure.savefig(path)
    pyplot().close(figure)


def roofline(rows: Sequence[ResultRow], title: str) -> Any:
    """Time per layer over tokens beside the floor, and the share of the floor's speed reached; a column per shape.

    Args:
      rows: rows of one routing and one slot distribution, as `sweep` yields them; rows with an error are left out.
      title: what was measured: device and date.

    Returns:
      The figure.

    Raises:
      InputError: matplotlib is not installed.
    """
    rows = [row for row in rows if "error" not in row]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    sets = looks(row["adapters"] for row in rows)
    engines = looks(row["engine"] for row in rows)
    columns = max(len(shapes), 1)
    size = (1.6 + max(3.4 * columns, 5.6), 5.6)
    figure, axes = subplots(2, columns, figsize=size, squeeze=False, sharex="col", sharey="row", height_ratios=(2, 1))
    for shape, times, shares in zip(shapes, *axes, strict=False):
        _column(times, shares, [row for row in rows if row["shape"] == shape], sets, engines)
        times.set_title(shape)
    axes[0][0].set_ylabel("µs per layer")
    axes[1][0].set_ylabel("share of the\nfloor's speed")
    axes[1][0].set_ylim(0, 1.05 * max([1.0, *(row["floor_us"] / row["layer_us"] for row in rows)]))
    keys = _keys(sets, engines)
    figure.suptitle(title, fontsize=10)
    most = 2 * columns + (2 if len(engines) > 1 else 5)  # engines have long names
    figure.legend(handles=keys, loc="outside lower center", ncols=min(len(keys), most), frameon=False, fontsize=9)
    return figure


def _column(
    times: Any, shares: Any, rows: Sequence[ResultRow], sets: dict[str, Look], engines: dict[str, Look]
) -> None:
    """Draws one shape: the times above, the shares of the floor's speed below."""
    for adapters, (color, marker) in sets.items():
        for index, (engine, look) in enumerate(engines.items()):
            cells = [row for row in rows if (row["adapters"], row["engine"]) == (adapters, engine)]
            _curve(times, shares, cells, color, look.marker if len(engines) > 1 else marker, with_floor=index == 0)
    ticks = sorted({row["tokens"] for row in rows})
    times.set_yscale("log")
    times.set_xscale("log", base=2)
    shares.axhline(1, color="0.3", ls=":")
    shares.set(xlabel="tokens in the batch", xticks=ticks, xticklabels=[_short(tick) for tick in ticks])
    shares.minorticks_off()
    for axis in (times, shares):
        axis.grid(alpha=0.3, which="major")


def _curve(times: Any, shares: Any, cells: Sequence[ResultRow], color: str, marker: str, *, with_floor: bool) -> None:
    """Draws one engine with one set of adapters."""
    cells = sorted(cells, key=lambda row: row["tokens"])
    tokens, reached = [row["tokens"] for row in cells], [row["layer_us"] for row in cells]
    floor = [row["floor_us"] for row in cells]
    look = {"color": color, "marker": marker, "ms": 4.5, "lw": 1.4}
    times.plot(tokens, reached, **look)
    shares.plot(tokens, [f / r for f, r in zip(floor, reached, strict=True)], **look)
    if with_floor:
        times.plot(tokens, floor, color=color, ls=":")


def _keys(sets: dict[str, Look], engines: dict[str, Look]) -> list[Any]:
    """The legend's entries: a colour per set of adapters and, where there are several engines, a marker per engine."""
    from matplotlib.lines import Line2D

    several = len(engines) > 1
    keys = [
        Line2D([], [], color=look.color, marker="" if several else look.marker, ms=4.5, label=name)
        for name, look in sets.items()
    ]
    keys.append(Line2D([], [], color="0.3", ls=":", label="floor"))
    if several:
        keys += [Line2D([], [], color="0.3", marker=look.marker, ms=4.5, label=name) for name, look in engines.items()]
    return keys


def _short(tokens: int) -> str:
    """1024 tokens and their multiples as 1k, 2k, ..."""
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)

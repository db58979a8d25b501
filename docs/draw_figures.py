"""Draws the figure of the README from the committed results: `python docs/draw_figures.py`.

The SVG carries a digest of the rows that it shows; `tests/test_docs.py` compares it with the results.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "pallas_kernels" / "results"
FIGURE = DOCS / "images" / "layer_latency.svg"
SHAPE = "qwen3-30b-a3b"
INK = "#333333"
ENGINES = {
    "jax_moe_lora": ("jax_moe_lora", "#0072b2"),
    "jax.lax.ragged_dot": ("jax.lax.ragged_dot", "#e69f00"),
    "torch-grouped_mm": ("torch grouped_mm", "#009e73"),
    "transformers-grouped_mm": ("transformers + PEFT", "#cc79a7"),
}
ADAPTERS = {
    "none": ("no adapter", "#56b4e9"),
    "s8r16": ("8 adapters of rank 16", "#0072b2"),
    "s32r16": ("32 adapters of rank 16", "#d55e00"),
}


def main(figure: Path = FIGURE) -> None:
    """Draws the panels and writes them as SVG."""
    peers, sweep = load("h200_peers.json"), load("h200.json")
    with plt.rc_context({"font.size": 9, "svg.hashsalt": "jax_moe_lora", "axes.edgecolor": INK}):
        drawing, (base, one, many) = plt.subplots(1, 3, figsize=(11, 4), layout="constrained", sharey=True)
        draw_peers(base, [row for row in peers["rows"] if row["adapters"] == "none"])
        draw_peers(one, [row for row in peers["rows"] if row["adapters"] != "none"])
        draw_sweep(many, sweep_rows(sweep))
        finish({"No adapter": base, "One adapter of rank 16": one, "Many adapters in one batch (jax_moe_lora)": many})
        drawing.suptitle(
            f"Latency of one routed layer of Qwen3-30B-A3B in bfloat16 ({sweep['device']}, {sweep['date']})",
            fontsize=11,
        )
        figure.parent.mkdir(parents=True, exist_ok=True)
        drawing.savefig(figure, metadata={"Date": None, "Identifier": digest(peers, sweep)}, dpi=150)
        plt.close(drawing)


def finish(panels: dict[str, Axes]) -> None:
    """Titles, one logarithmic scale and a legend for each panel."""
    for title, axes in panels.items():
        axes.set_title(title, fontsize=10)
        axes.set_yscale("log")
        axes.set_ylim(15, 40000)
        axes.set_xlabel("tokens in the batch")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False, loc="upper left")
    next(iter(panels.values())).set_ylabel("microseconds (lower is faster)")


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def sweep_rows(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells of one shape with uniform routing and slots, for the sets of adapters that are drawn."""
    return [
        row
        for row in sweep["rows"]
        if row["shape"] == SHAPE and row["adapters"] in ADAPTERS and row["routing"] == row["slots"] == "uniform"
    ]


def digest(peers: dict[str, Any], sweep: dict[str, Any]) -> str:
    """Identifies what the figure shows."""
    shown = [peers["rows"], sweep_rows(sweep), sweep["device"], sweep["date"]]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def draw_peers(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Latency of each library over the number of tokens, and their common floor."""
    for engine, (label, color) in ENGINES.items():
        cells = [row for row in rows if row["engine"] == engine]
        if not cells:
            continue
        places = range(len(cells))
        axes.plot(places, [row["layer_us"] for row in cells], "o-", color=color, markersize=4, label=label)
        if engine == "torch-grouped_mm":
            continue  # its figures would cover those of transformers
        for place, row in zip(places, cells, strict=True):
            axes.annotate(
                f"{row['layer_us']:.0f}",
                (place, row["layer_us"]),
                (0, -17 if engine == "jax_moe_lora" else 5),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                color=color,
            )
    here = [row for row in rows if row["engine"] == "jax_moe_lora"]
    axes.plot(range(len(here)), [row["floor_us"] for row in here], "--", color=INK, linewidth=1, label="floor")
    axes.set_xticks(range(len(here)), [str(row["tokens"]) for row in here])
    axes.set_xlim(-0.3, len(here) - 0.7)


def draw_sweep(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Latency over the number of tokens, and below each line its floor."""
    for adapters, (label, color) in ADAPTERS.items():
        cells = sorted((row for row in rows if row["adapters"] == adapters), key=lambda row: row["tokens"])
        tokens = [row["tokens"] for row in cells]
        axes.plot(tokens, [row["layer_us"] for row in cells], "o-", color=color, markersize=3.5, label=label)
        axes.plot(tokens, [row["floor_us"] for row in cells], "--", color=color, linewidth=1)
    axes.plot([], [], "--", color=INK, linewidth=1, label="the floor of each")
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(count) for count in tokens])


if __name__ == "__main__":
    main()

"""What a benchmark writes: a CSV with the peers' columns, a JSON with where and how, a plot."""

import csv
import io
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import jax

from jax_moe_lora.benchmark.layer import METHOD, PEAK_BYTES, PEAK_FLOPS

COLUMNS = ("shape", "tokens", "adapters", "engine", "layer_us", "floor_us", "rel_err")
Row = dict[str, Any]


def write_csv(rows: Sequence[Row]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def write_json(rows: Sequence[Row], command: str) -> str:
    about = {
        "device": jax.devices()[0].device_kind,
        "date": date.today().isoformat(),
        "versions": {"jax": jax.__version__, "jaxlib": jax.lib.__version__},
        "command": command,
        "method": METHOD,
        "ceilings": {"bytes_per_s": PEAK_BYTES, "bf16_flop_per_s": PEAK_FLOPS},
    }
    return json.dumps(about | {"rows": list(rows)}, indent=1) + "\n"


def read_peers(path: Path, engine: str) -> dict[tuple[str, int, str], float]:
    """Microseconds of one engine of a CSV with these columns, by (shape, tokens, adapters)."""
    with path.open(newline="") as file:
        cells = [row for row in csv.DictReader(file) if row["engine"] == engine]
    return {(row["shape"], int(row["tokens"]), row["adapters"]): float(row["layer_us"]) for row in cells}


def plot(rows: Sequence[Row], path: Path) -> None:
    """Time over tokens beside the floor, a panel a shape. Needs the `plots` extra."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, axes = pyplot.subplots(1, len(shapes), figsize=(5 * len(shapes), 4), squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        for color, name in enumerate(dict.fromkeys(row["adapters"] for row in rows if row["shape"] == shape)):
            cells = [row for row in rows if row["shape"] == shape and row["adapters"] == name]
            tokens = [row["tokens"] for row in cells]
            axis.loglog(tokens, [row["layer_us"] for row in cells], f"C{color}o-", label=name)
            axis.loglog(tokens, [row["floor_us"] for row in cells], f"C{color}:")
        axis.set(title=shape, xlabel="tokens", ylabel="microseconds a layer (dotted: floor)")
        axis.legend(title="adapters")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

"""What a benchmark writes: a CSV of figures, a JSON that also says where and how, and what was drawn."""

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_moe_lora.benchmark.ceilings import Ceilings, measure_ceilings
from jax_moe_lora.benchmark.layer import METHOD, ResultRow
from jax_moe_lora.benchmark.problem import draw
from jax_moe_lora.devices import require_device
from jax_moe_lora.errors import InputError
from pallas_kernels.hopper import tuned_file
from pallas_kernels.specs import ADAPTERS, LAYERS

MEASURED = ("shape", "tokens", "adapters", "engine", "layer_us", "floor_us", "rel_err", "min_us", "max_us", "compile_s")
DRAWN = ("routing", "slots", "hit_experts", "draw")
COMPARED = ("best_peer", "times_as_fast")
COLUMNS = (*MEASURED, *DRAWN, *COMPARED)
CELL = ("shape", "tokens", "adapters", "routing", "slots")
"""What the engines of a table have in common. `draw` says whether they also had the same rows."""
OURS = "jax_moe_lora"


def write_csv(rows: Sequence[ResultRow]) -> str:
    """The text of a CSV file with the rows that have figures."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for row in rows if "error" not in row)
    return out.getvalue()


def about(commands: Sequence[str]) -> dict[str, Any]:
    """Where, when and how a benchmark was measured.

    Args:
      commands: the commands that were run.

    Returns:
      Device, date, versions, commands, tuned configs, method and ceilings.
    """
    return {
        "device": require_device().device_kind,
        "date": date.today().isoformat(),
        "versions": versions("jax", "jaxlib"),
        "commands": list(commands),
        "tuned": tuned_file.source(),
        "method": METHOD,
        "ceilings": asdict(measure_ceilings()),
    }


def versions(*packages: str) -> dict[str, str]:
    """Package -> version, of the packages that are installed."""
    installed = {}
    for package in packages:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def write_json(rows: Sequence[ResultRow], head: dict[str, Any]) -> str:
    """The text of a JSON file with what `about` returns and the rows."""
    return json.dumps(head | {"rows": list(rows)}, indent=1) + "\n"


class EarlierResults(NamedTuple):
    """The results in a JSON file to which a run adds its own.

    Attributes:
      rows: the rows of earlier runs.
      commands: their commands.
      ceilings: the ceilings of all floors in the file; None if there is no file yet.
    """

    rows: list[ResultRow]
    commands: list[str]
    ceilings: Ceilings | None


def read_earlier(path: Path) -> EarlierResults:
    """Reads the results of earlier runs on this device.

    Args:
      path: the JSON file; it need not exist.

    Returns:
      The results.

    Raises:
      InputError: the file holds something else, or results of another device, method or version.
    """
    if not path.exists():
        return EarlierResults([], [], None)
    try:
        content = json.loads(path.read_text())
        earlier = EarlierResults(content["rows"], content["commands"], Ceilings(**content["ceilings"]))
        _ = content["versions"]["jax"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no results of this command ({error!r}); leave out --keep.") from error
    now = about([])
    for name in ("device", "tuned", "method"):
        if content.get(name) != now[name]:
            raise InputError(f"{path} has {name} {content.get(name)!r}, this run {now[name]!r}; give another --out.")
    if {name: content["versions"].get(name) for name in now["versions"]} != now["versions"]:
        raise InputError(
            f"{path} was measured with {content['versions']}, this is {now['versions']}; give another --out."
        )
    return earlier


def merge(old: Sequence[ResultRow], new: Sequence[ResultRow]) -> list[ResultRow]:
    """The old rows without the cells that were measured again, followed by the new rows."""

    def place(row: ResultRow) -> tuple[Any, ...]:
        return (row["engine"], *(row.get(name) for name in CELL))

    again = {place(row) for row in new}
    return [row for row in old if place(row) not in again] + list(new)


def compared(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """The rows; ours say which other engine was fastest on the same draw, and how many times our time it took.

    A row over quantised weights is compared with the 16-bit layer of the same backend.

    Args:
      rows: those of one run, or of runs that one file holds.

    Returns:
      The rows in their order.
    """
    peers: dict[tuple[Any, ...], list[ResultRow]] = {}
    for row in rows:
        if "error" not in row and not _quantised(row):
            of = row["engine"] if row["engine"].startswith(OURS) else ""
            peers.setdefault((of, *_drawn(row)), []).append(row)
    return [_beside(row, peers.get((_compared_with(row), *_drawn(row)), ())) for row in rows]


def _drawn(row: ResultRow) -> tuple[Any, ...]:
    return (row.get("draw"), *(row.get(name) for name in CELL))


def _quantised(row: ResultRow) -> str:
    """What its weights are quantised to, empty for 16 bits: `sweep.ThisLibrary.name` says it."""
    return row["engine"].partition("/")[2]


def _compared_with(row: ResultRow) -> str:
    """The engine of ours that a row of ours is compared with; empty for those of others."""
    return row["engine"].partition("/")[0] if _quantised(row) else ""


def _beside(row: ResultRow, peers: Sequence[ResultRow]) -> ResultRow:
    row = {name: value for name, value in row.items() if name not in COMPARED}
    if not peers or not row["engine"].startswith(OURS) or "error" in row:
        return row
    best = min(peers, key=lambda peer: peer["layer_us"])
    return row | {"best_peer": best["engine"], "times_as_fast": round(best["layer_us"] / row["layer_us"], 3)}


def write_draws(rows: Sequence[ResultRow]) -> bytes:
    """What was drawn for the rows, as an `.npz` file: for engines that are not of this library.

    Args:
      rows: their cells. A row whose draw is not what is drawn today is left out.

    Returns:
      The file: `DRAW.chosen` `[T, K]`, `DRAW.slots` `[T]` and `DRAW.weights` `[T, K]` for each `draw` of the rows.
    """
    arrays: dict[str, np.ndarray] = {}
    for row in rows:
        size = LAYERS[row["shape"]]
        cell = size.num_experts, size.top_k, row["tokens"], row["routing"], ADAPTERS[row["adapters"]], row["slots"]
        if f"{row.get('draw')}.chosen" not in arrays and (drawn := draw(*cell)).digest == row.get("draw"):
            arrays |= {f"{drawn.digest}.{name}": value for name, value in vars(drawn).items()}
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def summary(rows: Iterable[ResultRow]) -> list[str]:
    """Sentences that sum up a sweep.

    Args:
      rows: as `compared` gives them.

    Returns:
      A sentence about the share of the floor's speed, and one about each comparison: with the best peers, and of
      each format with the 16-bit layer.
    """
    rows = list(rows)
    measured = [row for row in rows if "error" not in row and row["engine"] == OURS]
    if not measured:
        return _of_formats(rows)
    reached = _geometric_mean(row["floor_us"] / row["layer_us"] for row in measured)
    worst = min(measured, key=lambda row: row["floor_us"] / row["layer_us"])
    lines = [
        f"{reached:.2f} of the floor's speed (geometric mean of {len(measured)} cells); "
        f"least {worst['floor_us'] / worst['layer_us']:.2f}: {_cell(worst)}."
    ]
    both = [row for row in measured if "times_as_fast" in row]
    for what, some in (
        ("without adapters", [row for row in both if row["adapters"] == "none"]),
        ("with adapters", [row for row in both if row["adapters"] != "none"]),
    ):
        if some:
            ordered = sorted(some, key=lambda row: row["times_as_fast"])
            slower = [f"{_cell(row)} ({row['times_as_fast']:.2f})" for row in ordered if row["times_as_fast"] < 1]
            lines.append(
                f"{_geometric_mean(row['times_as_fast'] for row in some):.2f} times as fast as the best peer {what} "
                f"(geometric mean of {len(some)} cells); slower in {len(slower)}"
                f"{': ' + ', '.join(slower) if slower else ''}."
            )
    return lines + _of_formats(rows)


def _of_formats(rows: Sequence[ResultRow]) -> list[str]:
    """How each quantised layer of ours compares with the 16-bit one."""
    by_engine: dict[str, list[float]] = {}
    for row in rows:
        if _quantised(row) and "times_as_fast" in row:
            by_engine.setdefault(row["engine"], []).append(row["times_as_fast"])
    return [
        f"{_geometric_mean(ratios):.2f} times as fast as the 16-bit layer: {engine} (geometric mean of {len(ratios)} "
        f"cells; {min(ratios):.2f} to {max(ratios):.2f})."
        for engine, ratios in by_engine.items()
    ]


def _cell(row: ResultRow) -> str:
    return f"{row['shape']} {row['adapters']} T={row['tokens']}"


def _geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))

"""What a benchmark writes: a CSV of figures, a JSON that also says where and how, and a comparison with peers."""

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

from jax_moe_lora.benchmark.ceilings import Ceilings, measure_ceilings
from jax_moe_lora.benchmark.layer import METHOD, ResultRow
from jax_moe_lora.devices import require_device
from jax_moe_lora.errors import InputError
from pallas_kernels.hopper import tuned_file

PEER_COLUMNS = ("shape", "tokens", "adapters", "engine", "layer_us", "floor_us", "rel_err")
COLUMNS = (*PEER_COLUMNS, "min_us", "max_us", "compile_s", "routing", "slots")
CELL = ("shape", "tokens", "adapters", "engine", "routing", "slots")
Peers = dict[tuple[str, int, str], dict[str, float]]
"""(shape, tokens, adapters) -> engine -> microseconds."""


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
    again = {tuple(row.get(name) for name in CELL) for row in new}
    return [row for row in old if tuple(row.get(name) for name in CELL) not in again] + list(new)


def read_peers(path: Path) -> Peers:
    """Reads the times of other engines.

    Args:
      path: a CSV file with the columns of `PEER_COLUMNS`.

    Returns:
      The times.

    Raises:
      InputError: a column is missing.
    """
    peers: Peers = {}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if missing := set(PEER_COLUMNS[:5]) - set(reader.fieldnames or ()):
            raise InputError(f"{path} has no column {', '.join(sorted(missing))}; expected {', '.join(PEER_COLUMNS)}.")
        for row in reader:
            key = row["shape"], int(row["tokens"]), row["adapters"]
            peers.setdefault(key, {})[row["engine"]] = float(row["layer_us"])
    return peers


def peers_of(row: ResultRow, peers: Peers) -> dict[str, float]:
    """The peers' times for a row's cell; they were measured with uniform routing and slots only."""
    if (row["routing"], row["slots"]) != ("uniform", "uniform"):
        return {}
    return peers.get((row["shape"], row["tokens"], row["adapters"]), {})


def summary(rows: Iterable[ResultRow], peers: Peers, engine: str) -> list[str]:
    """Sentences that sum up a sweep.

    Args:
      rows: the rows of the sweep.
      peers: the times of other engines.
      engine: the engine to compare with.

    Returns:
      A sentence about the share of the floor's speed, and one about each comparison with `engine`.
    """
    measured = [row for row in rows if "error" not in row and row["engine"] == "jax_moe_lora"]
    if not measured:
        return []
    reached = _geometric_mean(row["floor_us"] / row["layer_us"] for row in measured)
    worst = min(measured, key=lambda row: row["floor_us"] / row["layer_us"])
    lines = [
        f"{reached:.2f} of the floor's speed (geometric mean of {len(measured)} cells); "
        f"least {worst['floor_us'] / worst['layer_us']:.2f}: {_cell(worst)}."
    ]
    both = [(peers_of(row, peers)[engine] / row["layer_us"], row) for row in measured if engine in peers_of(row, peers)]
    for what, some in (
        ("without adapters", [pair for pair in both if pair[1]["adapters"] == "none"]),
        ("with adapters", [pair for pair in both if pair[1]["adapters"] != "none"]),
    ):
        if some:
            slower = [
                f"{_cell(row)} ({ratio:.2f})" for ratio, row in sorted(some, key=lambda pair: pair[0]) if ratio < 1
            ]
            lines.append(
                f"{_geometric_mean(ratio for ratio, _ in some):.2f} times as fast as {engine} {what} (geometric mean "
                f"of {len(some)} cells); slower in {len(slower)}{': ' + ', '.join(slower) if slower else ''}."
            )
    return lines


def _cell(row: ResultRow) -> str:
    return f"{row['shape']} {row['adapters']} T={row['tokens']}"


def _geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))

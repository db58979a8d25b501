"""The configs that were measured on a device, and which config a call gets.

A tuned file has two lists, because a plan is cut before widths are known and both matmuls of a layer read its tiles:
`tiles` (rows per tile, by experts and pairs) and `matmuls` (stages and warpgroups, by experts, pairs, widths, gated and
dtype). `pairs` is a power of two; an entry holds for the pairs above half of it. It was measured at its own number, the
most: a tile that is too large costs little, one that is too small reads weights twice.

The files are `tuned/<device>.json`; `JAX_MOE_LORA_TUNED` names another file, or is `off`. The look-up happens when a
function is traced: set the variable before, a jitted function keeps what it was traced with.
"""

import functools
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pallas_kernels.backend import default_device, target_sms
from pallas_kernels.errors import TunedFileError
from pallas_kernels.hopper.tuning import HopperConfig, MatmulShape, bucket, heuristic, why_not

VARIABLE = "JAX_MOE_LORA_TUNED"
FOLDER = Path(__file__).parent / "tuned"


@dataclass(frozen=True)
class TunedConfigs:
    """What a tuned file holds.

    Attributes:
      tiles: (experts, bucket of pairs) -> rows per tile.
      matmuls: `MatmulShape.key` -> config.
    """

    tiles: dict[tuple[int, int], int]
    matmuls: dict[tuple[Any, ...], HopperConfig]


def tile_rows(pairs: int, num_experts: int) -> int:
    """Rows a tile of the Hopper backend's plan."""
    tuned = _current()
    measured = tuned.tiles.get((num_experts, bucket(pairs))) if tuned else None
    return measured or heuristic(pairs, num_experts).tile_rows


def config_for(call: MatmulShape, rows: int) -> HopperConfig:
    """The config of a matmul over tiles of `rows` rows.

    Raises:
      ValueError: for rows that no kernel takes.
      TunedFileError: see `read`.
    """
    if reason := why_not(HopperConfig(rows, 2)):
        raise ValueError(f"The Hopper kernels cannot read these tiles: {reason}.")
    tuned = _current()
    measured = tuned.matmuls.get(call.key) if tuned else None
    likely = heuristic(call.pairs, call.experts, rows)
    # An entry for other tiles than the plan has (of an explicit size, say) would cut them again: more kernels.
    if measured is None or measured.tile_rows != rows:
        return likely
    return replace(measured, widths=likely.widths, num_sms=target_sms())


def source() -> str:
    """Name of the tuned file that the default device uses, or `heuristic`."""
    path = _path()
    return path.name if path else "heuristic"


def slug(device_kind: str) -> str:
    """`NVIDIA H200` -> `nvidia-h200`, as the files of `tuned/` are named."""
    return re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-")


def read(path: Path) -> dict[str, Any]:
    """A tuned file as it stands, checked.

    Raises:
      TunedFileError: it is not JSON, lacks a field, has one that is unknown, or an entry that the kernels cannot run.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TunedFileError(f"{path} cannot be read as a tuned file: {error}.") from error
    if not isinstance(content, dict) or not {"device", "tiles", "matmuls"} <= content.keys():
        raise TunedFileError(f"{path} is no tuned file: expected an object with device, tiles and matmuls.")
    parse(content, str(path))
    return content


def parse(content: dict[str, Any], name: str) -> TunedConfigs:
    """The entries of a tuned file, each checked; `name` is for the errors. Raises as `read` does."""
    tiles: dict[tuple[int, int], int] = {}
    matmuls: dict[tuple[Any, ...], HopperConfig] = {}
    for entry in content["tiles"]:
        _check_fields(entry, {"experts", "pairs", "tile_rows"}, name)
        _check_new(key := (entry["experts"], entry["pairs"]), tiles, entry, name)
        _check_config(HopperConfig(entry["tile_rows"], 2), entry, name)
        tiles[key] = entry["tile_rows"]
    cut, call = ("tile_rows", "stages", "warpgroups"), tuple(MatmulShape.__dataclass_fields__)
    for entry in content["matmuls"]:
        _check_fields(entry, {*cut, *call}, name)
        key = MatmulShape(**{field: entry[field] for field in call}).key
        _check_new(key, matmuls, entry, name)
        _check_config(HopperConfig(**{field: entry[field] for field in cut}), entry, name)
        matmuls[key] = HopperConfig(**{field: entry[field] for field in cut})
    return TunedConfigs(tiles, matmuls)


def _check_fields(entry: Any, expected: set[str], name: str) -> None:
    """`us` and `heuristic_us`, where they are there, say what was measured."""
    known = expected | {"us", "heuristic_us"}
    if not isinstance(entry, dict) or not expected <= entry.keys() <= known:
        raise TunedFileError(f"{name}: entry {entry} has other fields than {', '.join(sorted(expected))}.")
    for field in expected & {"experts", "pairs", "in_width", "out_width"}:
        if type(entry[field]) is not int or entry[field] < 1:
            raise TunedFileError(f"{name}: entry {entry}: {field} is no positive integer.")
    if entry["pairs"] != bucket(entry["pairs"]):
        raise TunedFileError(f"{name}: entry {entry}: pairs is no power of two.")


def _check_new(key: tuple[Any, ...], entries: dict[Any, Any], entry: Any, name: str) -> None:
    if key in entries:
        raise TunedFileError(f"{name}: entry {entry} comes twice.")


def _check_config(config: HopperConfig, entry: Any, name: str) -> None:
    if reason := why_not(config):
        raise TunedFileError(f"{name}: entry {entry}: {reason}.")


def _path() -> Path | None:
    named = os.environ.get(VARIABLE)
    if named == "off":
        return None
    if named:
        return Path(named)
    path = FOLDER / f"{slug(getattr(default_device(), 'device_kind', ''))}.json"
    return path if path.is_file() else None


def _current() -> TunedConfigs | None:
    path = _path()
    if path is None:
        return None
    if not path.is_file():
        raise TunedFileError(f"There is no file {path}, which {VARIABLE} names; give a tuned file, or 'off'.")
    return _load(path, path.stat().st_mtime_ns, getattr(default_device(), "device_kind", ""))


@functools.cache
def _load(path: Path, changed: int, device_kind: str) -> TunedConfigs:
    """`changed`: when, so that a file that is written anew is read anew."""
    content = read(path)
    if content["device"] != device_kind:
        raise TunedFileError(f"{path} was tuned on {content['device']!r}, this is {device_kind!r}; see {VARIABLE}.")
    return parse(content, str(path))

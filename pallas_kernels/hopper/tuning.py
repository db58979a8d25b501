"""How the Hopper kernels cut a call: a frozen config, explicit, from the device's tuned file, or by a heuristic.

Static sizes and dtype alone decide, never routing, slots, ranks or whether adapters are there: a base row keeps its
bits with and without a bank only if both runs are cut alike. So there is no rank in the keys. (As how wide a tile is
multiplied, of its config's widths, follows from its rows and so from routing, and from nothing of the adapters.)

A tuned file has two lists, because a plan is cut before widths are known and both matmuls of a layer read its tiles:
`tiles` (rows a tile, by experts and pairs) and `matmuls` (stages and warpgroups, by experts, pairs, widths, gated and
dtype).
`pairs` is a power of two; an entry holds for the pairs above half of it. It was measured at its own number, the most: a
tile that is too large costs little, one that is too small reads weights twice.

The files are `tuned/<device>.json`; `JAX_MOE_LORA_TUNED` names another file, or is `off`. The look-up happens when a
function is traced: set the variable before, a jitted function keeps what it was traced with.
"""

import functools
import itertools
import json
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.backend import default_device
from pallas_kernels.hopper.ring import BARRIER_BYTES, COMPUTE_WARPGROUPS, DEPTH, HALF, NUM_SMS, SMEM_BYTES

MAX_ROWS = 192  # of a tile: both accumulators in registers
LEAST_SPLIT = 112  # rows a tile from which tiles are multiplied as what they hold
VARIABLE = "JAX_MOE_LORA_TUNED"
FOLDER = Path(__file__).parent / "tuned"


class TunedFileError(ValueError):
    """A tuned file that cannot be used; the message names the file, the entry and what was expected."""


@dataclass(frozen=True)
class Config:
    """How one call is cut.

    Attributes:
      tile_rows: rows a tile, a multiple of 8. stages: of the ring. warpgroups: that multiply, 1 or 2.
      widths: fewer rows than `tile_rows` as which a tile is multiplied if it has no more; multiples of 8, ascending.
      num_sms: blocks. apart: weights and pages have a ring each; for the interpreter, whose race detector takes two
        views of one ring for the same memory, whatever the stage.
    """

    tile_rows: int
    stages: int
    warpgroups: int = COMPUTE_WARPGROUPS
    num_sms: int = NUM_SMS
    apart: bool = False
    widths: tuple[int, ...] = ()


@dataclass(frozen=True)
class Matmul:
    """What a tuned matmul is known by. `pairs`: of the call; `key` has its bucket."""

    experts: int
    pairs: int
    in_width: int
    out_width: int
    gated: bool
    dtype: str

    @classmethod
    def of(cls, weights: tuple[jax.Array, ...], pairs: int) -> "Matmul":
        """That of one weight, or of gate and up `[E, out, in]`."""
        experts, out_width, in_width = weights[0].shape
        return cls(experts, pairs, in_width, out_width, len(weights) == 2, str(weights[0].dtype))

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(asdict(replace(self, pairs=bucket(self.pairs))).values())


@dataclass(frozen=True)
class Tuned:
    """A tuned file: `tiles` maps (experts, bucket of pairs) to rows a tile, `matmuls` a `Matmul.key` to its config."""

    tiles: dict[tuple[int, int], int]
    matmuls: dict[tuple[Any, ...], Config]


def bucket(pairs: int) -> int:
    """The power of two that is not below `pairs`."""
    return 1 << max(pairs - 1, 0).bit_length()


def smem_bytes(config: Config) -> int:
    """Shared memory that a block takes, barriers aside."""
    stage = (2 * HALF * config.warpgroups + config.tile_rows) * DEPTH * 2
    return config.stages * stage + config.warpgroups * config.tile_rows * HALF * 2


def why_not(config: Config) -> str:
    """Empty where the kernels can run the config."""
    for name in ("tile_rows", "stages", "warpgroups"):
        if type(getattr(config, name)) is not int:
            return f"{name} is {getattr(config, name)!r}; expected an integer"
    if not 8 <= config.tile_rows <= MAX_ROWS or config.tile_rows % 8:
        return f"tile_rows is {config.tile_rows}; expected a multiple of 8 up to {MAX_ROWS}"
    if config.warpgroups not in (1, COMPUTE_WARPGROUPS):
        return f"warpgroups is {config.warpgroups}; expected 1 or {COMPUTE_WARPGROUPS}"
    ascending = (0, *config.widths, config.tile_rows)
    if any(width % 8 for width in config.widths) or any(a >= b for a, b in itertools.pairwise(ascending)):
        return f"widths are {config.widths}; expected multiples of 8, ascending, below tile_rows"
    if config.stages < 2:
        return f"stages is {config.stages}; expected 2 or more"
    if smem_bytes(config) > SMEM_BYTES - BARRIER_BYTES:
        return f"{smem_bytes(config)} bytes of shared memory; a block has {SMEM_BYTES - BARRIER_BYTES}"
    return ""


def deepest(rows: int, warpgroups: int = COMPUTE_WARPGROUPS) -> Config:
    """The config with the most stages that fit."""
    config = Config(rows, 2, warpgroups)
    while not why_not(larger := replace(config, stages=config.stages + 1)):
        config = larger
    return config


def heuristic(pairs: int, num_experts: int, rows: int | None = None) -> Config:
    """A config that is valid for every shape; `rows`: of a tile, where they are given."""
    mean = pairs / num_experts
    if rows is None:
        rows = _likely_rows(mean)
    config = deepest(rows, 1 if mean <= 1 else COMPUTE_WARPGROUPS)  # with few rows, more and smaller items
    return replace(config, widths=_likely_widths(mean, rows))


def _likely_rows(mean: float) -> int:
    """Rows a tile. All of an expert's if that can be, or as many in each of its tiles, under uniform routing."""
    deviation = mean**0.5
    if mean + 3 * deviation <= MAX_ROWS:  # all but one expert in a thousand
        rows = max(8, -(-int(mean + 3 * deviation) // 8) * 8)
        return _wider(rows) if rows >= LEAST_SPLIT else rows
    tiles = -(-int(mean + deviation) // MAX_ROWS)
    if tiles == 1:
        return MAX_ROWS
    return _wider(-(-int(mean + deviation) // tiles))


def _likely_widths(mean: float, rows: int) -> tuple[int, ...]:
    """`Config.widths` for the rows that an expert's last tile is likely to have.

    Each is a part of the kernel of its own, so they are few. Tiles of few rows need none: reading their weights takes
    longer than multiplying them.
    """
    if rows < LEAST_SPLIT:
        return ()
    rest = mean - max(0, -(-int(mean + mean**0.5) // rows) - 1) * rows
    likely = {_wider(max(1, int(rest + spread * mean**0.5))) for spread in (-0.5, 0, 0.7, 1.5)}
    return tuple(sorted(width for width in likely if width < rows))


def _wider(rows: int) -> int:
    """The next multiple of 16, but for 160, where ptxas spills a gated product and its factors."""
    wide = -(-rows // 16) * 16
    return 176 if wide == 160 else wide


def tile_rows(pairs: int, num_experts: int) -> int:
    """Rows a tile of the Hopper backend's plan."""
    tuned = _current()
    found = tuned.tiles.get((num_experts, bucket(pairs))) if tuned else None
    return found or heuristic(pairs, num_experts).tile_rows


def config_for(call: Matmul, rows: int) -> Config:
    """The config of a matmul over tiles of `rows` rows.

    Raises:
      ValueError: for rows that no kernel takes. TunedFileError: see `read`.
    """
    if reason := why_not(Config(rows, 2)):
        raise ValueError(f"The Hopper kernels cannot read these tiles: {reason}.")
    tuned = _current()
    found = tuned.matmuls.get(call.key) if tuned else None
    likely = heuristic(call.pairs, call.experts, rows)
    # An entry for other tiles than the plan has (of an explicit size, say) would cut them again: more kernels.
    return replace(found, widths=likely.widths) if found and found.tile_rows == rows else likely


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


def parse(content: dict[str, Any], name: str) -> Tuned:
    """The entries of a tuned file, each checked; `name` is for the errors. Raises as `read` does."""
    tiles: dict[tuple[int, int], int] = {}
    matmuls: dict[tuple[Any, ...], Config] = {}
    for entry in content["tiles"]:
        _check_fields(entry, {"experts", "pairs", "tile_rows"}, name)
        _check_new(key := (entry["experts"], entry["pairs"]), tiles, entry, name)
        _check_config(Config(entry["tile_rows"], 2), entry, name)
        tiles[key] = entry["tile_rows"]
    own, call = ("tile_rows", "stages", "warpgroups"), tuple(Matmul.__dataclass_fields__)
    for entry in content["matmuls"]:
        _check_fields(entry, {*own, *call}, name)
        key = Matmul(**{field: entry[field] for field in call}).key
        _check_new(key, matmuls, entry, name)
        _check_config(Config(**{field: entry[field] for field in own}), entry, name)
        matmuls[key] = Config(**{field: entry[field] for field in own})
    return Tuned(tiles, matmuls)


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


def _check_config(config: Config, entry: Any, name: str) -> None:
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


def _current() -> Tuned | None:
    path = _path()
    if path is None:
        return None
    if not path.is_file():
        raise TunedFileError(f"There is no file {path}, which {VARIABLE} names; give a tuned file, or 'off'.")
    return _load(path, path.stat().st_mtime_ns, getattr(default_device(), "device_kind", ""))


@functools.cache
def _load(path: Path, changed: int, device_kind: str) -> Tuned:
    """`changed`: when, so that a file that is written anew is read anew."""
    content = read(path)
    if content["device"] != device_kind:
        raise TunedFileError(f"{path} was tuned on {content['device']!r}, this is {device_kind!r}; see {VARIABLE}.")
    return parse(content, str(path))

"""How the Hopper kernels cut a call: a frozen config, and a heuristic that has a valid one for every shape.

Static sizes and dtype alone decide, never routing, slots, ranks or whether adapters are there: a base row keeps its
bits with and without a bank only if both runs are cut alike. So there is no rank in the keys. (As how wide a tile is
multiplied, of its config's widths, follows from its rows and so from routing, and from nothing of the adapters.)

`tuned_file.py` looks a call up in the device's tuned file first.
"""

import itertools
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import jax

from pallas_kernels.backend import target_sms
from pallas_kernels.hopper.limits import BARRIER_BYTES, COMPUTE_WARPGROUPS, DEPTH, HALF, SMEM_BYTES

MAX_ROWS = 192  # of a tile: both accumulators in registers
LEAST_SPLIT = 112  # rows a tile from which tiles are multiplied as what they hold


@dataclass(frozen=True)
class HopperConfig:
    """How one call is cut.

    Attributes:
      tile_rows: rows per tile, a multiple of 8.
      stages: of the ring.
      warpgroups: that multiply, 1 or 2.
      widths: fewer rows than `tile_rows` as which a tile is multiplied if it has no more; multiples of 8, ascending.
      num_sms: blocks; those of the target (`backend.target_sms`) where nothing is given.
      apart: weights and pages have a ring each; for the interpreter, whose race detector takes two views of one ring
        for the same memory, whatever the stage.
    """

    tile_rows: int
    stages: int
    warpgroups: int = COMPUTE_WARPGROUPS
    num_sms: int = field(default_factory=target_sms)
    apart: bool = False
    widths: tuple[int, ...] = ()


@dataclass(frozen=True)
class MatmulShape:
    """The sizes by which a tuned matmul is found.

    Attributes:
      experts: E.
      pairs: routed rows of the call; `key` has their bucket.
      in_width: of the rows.
      out_width: of one weight's result.
      gated: gate and up in one call.
      dtype: of the weights.
    """

    experts: int
    pairs: int
    in_width: int
    out_width: int
    gated: bool
    dtype: str

    @classmethod
    def from_weights(cls, weights: tuple[jax.Array, ...], pairs: int) -> "MatmulShape":
        """Those of one weight, or of gate and up `[E, out, in]`."""
        experts, out_width, in_width = weights[0].shape
        return cls(experts, pairs, in_width, out_width, len(weights) == 2, str(weights[0].dtype))

    @property
    def key(self) -> tuple[Any, ...]:
        """What a tuned file's entries are found by."""
        return tuple(asdict(replace(self, pairs=bucket(self.pairs))).values())


def bucket(pairs: int) -> int:
    """The power of two that is not below `pairs`."""
    return 1 << max(pairs - 1, 0).bit_length()


def smem_bytes(config: HopperConfig) -> int:
    """Shared memory that a block takes, barriers aside."""
    stage = (2 * HALF * config.warpgroups + config.tile_rows) * DEPTH * 2
    return config.stages * stage + config.warpgroups * config.tile_rows * HALF * 2


def why_not(config: HopperConfig) -> str:
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


def deepest(rows: int, warpgroups: int = COMPUTE_WARPGROUPS) -> HopperConfig:
    """The config with the most stages that fit."""
    config = HopperConfig(rows, 2, warpgroups)
    while not why_not(larger := replace(config, stages=config.stages + 1)):
        config = larger
    return config


def heuristic(pairs: int, num_experts: int, rows: int | None = None) -> HopperConfig:
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
    """`HopperConfig.widths` for the rows that an expert's last tile is likely to have.

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

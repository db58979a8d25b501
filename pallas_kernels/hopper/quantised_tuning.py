"""How the Hopper kernel over quantised weights cuts a call; by static sizes and the format alone, as in `tuning.py`."""

from dataclasses import dataclass, field, replace

from pallas_kernels.backend import target_sms
from pallas_kernels.hopper.limits import BARRIER_BYTES, COMPUTE_WARPGROUPS, DEPTH, HALF, SMEM_BYTES
from pallas_kernels.quantised.format import UNIT, Format
from pallas_kernels.quantised.packing import unit_shape

# Rows of a tile, by what a thread holds beside the unpacked weights: its sums, and of fp8, whose scales are factors of
# sums, products that are added to them too.
MAX_ROWS = 160
MAX_ROWS_FP8 = 88
PARTS = 2  # units of 64 rows that a warpgroup multiplies
PAGE_STAGES = 2  # of the ring of LoRA steps
LONG_STAGE = 36 * 1024  # bytes of weights, beyond which more stages are better than longer ones


@dataclass(frozen=True)
class QuantisedConfig:
    """How one call is cut.

    Attributes:
      tile_rows: rows per tile, a multiple of 8.
      units: of 64 columns, that a stage of the ring holds.
      stages: of the ring.
      warpgroups: that multiply, 1 or 2.
      num_sms: blocks.
      interpreted: unpacked weights go through memory, since the interpreter has no operands in registers.
    """

    tile_rows: int
    units: int
    stages: int
    warpgroups: int = COMPUTE_WARPGROUPS
    num_sms: int = field(default_factory=target_sms)
    interpreted: bool = False

    def stage_bytes(self, format: Format) -> int:
        """Of the weights of one stage."""
        a, b = unit_shape(format)
        return PARTS * self.warpgroups * self.units * a * b * 4

    def smem_bytes(self, format: Format, adapters: bool) -> int:
        """Shared memory that a block takes, barriers aside."""
        rows = self.tile_rows * self.units * UNIT * 2
        # A LoRA step has as many ranks as a step of K has columns in 16 bits.
        pages = PAGE_STAGES * DEPTH * (PARTS * HALF * self.warpgroups + self.tile_rows) * 2 if adapters else 0
        return self.stages * (self.stage_bytes(format) + rows) + self.warpgroups * self.tile_rows * HALF * 2 + pages


def rows_per_tile(rows: int, format: Format) -> int:
    """Rows of a tile where the 16-bit kernel takes `rows`: as many as fit for four bits; for fp8, equal parts of them.

    Where experts have that many rows, unpacking a weight once for all of them wins: mxfp4 of gpt-oss-20b's sizes at
    T = 1024 took 440 us with 160 rows a tile and 572 with 88 on an H200 (`results/h200_quantised_tiles.json`).
    """
    if format.codec != "fp8":
        return min(rows, MAX_ROWS)
    return rows if rows <= MAX_ROWS_FP8 else -(-rows // (8 * -(-rows // MAX_ROWS_FP8))) * 8


def heuristic(
    pairs: int, num_experts: int, rows: int, columns: int, format: Format, adapters: bool = False
) -> QuantisedConfig:
    """A config that is valid for every shape.

    Args:
      pairs: routed rows of the call.
      num_experts: of the layer.
      rows: of a tile.
      columns: of a matrix.
      format: of the weights.
      adapters: the call has some. They decide how many stages fit, and no order of a sum.
    """
    warpgroups = 1 if pairs <= num_experts else COMPUTE_WARPGROUPS  # with few rows, more and smaller items
    step = 2 if format.block == (128, 128) else 1  # a stage holds whole blocks
    whole = -(-columns // UNIT)
    configs = [QuantisedConfig(rows, units, 2, warpgroups) for units in range(step, whole + step, step)]
    fitting = [config for config in configs if config.units == step or _is_no_longer_than_useful(config, format)]
    # Long stages are fewer copies; a last one that is not full is time lost.
    best = min(fitting, key=lambda config: (-(-whole // config.units) * config.units, -config.units))
    return deepest(best, format, adapters)


def deepest(config: QuantisedConfig, format: Format, adapters: bool) -> QuantisedConfig:
    """The config with the most stages that fit."""
    while fits(larger := replace(config, stages=config.stages + 1), format, adapters):
        config = larger
    return config


def why_not(config: QuantisedConfig, columns: int, format: Format) -> str:
    """Why the kernel cannot be cut like this; empty where it can.

    Args:
      config: the cut.
      columns: of a matrix.
      format: of the weights.
    """
    most = MAX_ROWS_FP8 if format.codec == "fp8" else MAX_ROWS
    if config.tile_rows % 8 or not 8 <= config.tile_rows <= most:
        return f"tile_rows is {config.tile_rows}; expected a multiple of 8 up to {most} for {format.name}"
    if config.warpgroups not in (1, COMPUTE_WARPGROUPS):
        return f"warpgroups is {config.warpgroups}; expected 1 or {COMPUTE_WARPGROUPS}"
    blocks = format.block == (128, 128)
    if config.units < 1 or (blocks and (config.units % 2 or columns // UNIT % config.units)):
        expected = f"a multiple of 2 that divides {columns // UNIT}" if blocks else "1 or more"
        return f"units is {config.units}; expected {expected}"
    if config.stages < 2 or not fits(config, format, adapters=True):
        return (
            f"{config.stages} stages of {config.units} units are {'too few' if config.stages < 2 else 'too many bytes'}"
        )
    return ""


def fits(config: QuantisedConfig, format: Format, adapters: bool) -> bool:
    """Whether a block has the shared memory for it."""
    return config.smem_bytes(format, adapters) <= SMEM_BYTES - BARRIER_BYTES


def _is_no_longer_than_useful(config: QuantisedConfig, format: Format) -> bool:
    """Whether enough stages fit, adapters or not: the length may not follow from these."""
    return config.stage_bytes(format) <= LONG_STAGE and fits(replace(config, stages=3), format, adapters=True)

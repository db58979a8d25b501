"""How the portable kernels cut a call: rows a tile and a frozen config, from static sizes alone."""

from dataclasses import dataclass

DEPTH = 64  # elements of K that one stage holds: one 128-byte swizzle row of a 16-bit type
TILE_ROWS = (32, 64)  # a tile has one of these: two or four warps of 16 rows each
SMEM_BYTES = 101_376  # a block's shared memory on sm_89 and sm_120, the smallest of all
RESERVED_BYTES = 2048  # room for barriers and alignment
MAX_STAGES = 3  # more would leave room for fewer blocks an SM
SHRINK_STAGES = 3
EXPAND_STAGES = 2  # of LoRA steps: most tiles have one or two


@dataclass(frozen=True)
class PortableConfig:
    """How the matmul is cut.

    Attributes:
      columns: of each weight that a block multiplies, 64 or 128; a gated pair has 64 of gate and 64 of up.
      stages: of the ring.
    """

    columns: int
    stages: int


def tile_rows(pairs: int, num_experts: int) -> int:
    """Rows a tile, which is the plan's alignment too; from static sizes alone, so that a row's bits are."""
    mean = pairs / max(num_experts, 1)
    return next((rows for rows in TILE_ROWS if rows >= mean), TILE_ROWS[-1])


def smem_bytes(config: PortableConfig, rows: int, num_weights: int) -> int:
    """Shared memory that a block takes, barriers aside: the ring of K, then the smaller one of LoRA steps."""
    return config.stages * (num_weights * config.columns + rows) * DEPTH * 2


def heuristic(rows: int, num_weights: int, out_width: int) -> PortableConfig:
    """A config that fits every GPU that the kernels run on."""
    columns = 128 if num_weights == 1 and out_width % 128 == 0 else 64
    configs = (PortableConfig(columns, stages) for stages in range(MAX_STAGES, 1, -1))
    return next(config for config in configs if smem_bytes(config, rows, num_weights) <= SMEM_BYTES - RESERVED_BYTES)

"""How the Hopper kernels cut a call: a frozen config, from static sizes alone."""

from dataclasses import dataclass, replace
from typing import Literal

from pallas_kernels.mosaic import BARRIER_BYTES, COMPUTE_WARPGROUPS, DEPTH, HALF, NUM_SMS, PART, SMEM_BYTES

TENSOR_ROWS = 256  # mean rows an expert from which the tensor form is the faster one
MAX_STREAM_ROWS = 128


@dataclass(frozen=True)
class Config:
    """How one call is cut.

    Attributes:
      form: see `grouped_matmul/hopper.py`. tile_rows: rows a tile, a multiple of 8; 128 in the tensor form.
      stages: of the ring. warpgroups: that multiply, 1 or 2; 2 in the tensor form.
      num_sms: blocks. apart: weights and pages have a ring each; for the interpreter, whose race detector takes two
        views of one ring for the same memory, whatever the stage.
    """

    form: Literal["stream", "tensor"]
    tile_rows: int
    stages: int
    warpgroups: int = COMPUTE_WARPGROUPS
    num_sms: int = NUM_SMS
    apart: bool = False


def smem_bytes(config: Config) -> int:
    """Shared memory that a block takes, barriers aside."""
    stage = (2 * HALF * config.warpgroups + config.tile_rows) * DEPTH * 2
    out = config.warpgroups * (config.tile_rows * HALF if config.form == "stream" else 2 * HALF * DEPTH) * 2
    return config.stages * stage + out


def heuristic(pairs: int, num_experts: int) -> Config:
    """A config that is valid for every shape; from static sizes alone, so that a row's bits are."""
    mean = pairs / num_experts
    likely = mean + 3 * mean**0.5  # rows of all but one expert in a thousand, under uniform routing
    rows = min(max(8, -(-int(likely) // 8) * 8), MAX_STREAM_ROWS)
    config = (
        Config("tensor", PART, 2)
        if mean >= TENSOR_ROWS
        else Config("stream", rows, 2, 1 if pairs <= num_experts else COMPUTE_WARPGROUPS)
    )
    while smem_bytes(larger := replace(config, stages=config.stages + 1)) <= SMEM_BYTES - BARRIER_BYTES:
        config = larger
    return config

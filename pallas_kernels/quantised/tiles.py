"""Rows of a quantised matrix, so many at a time that their dequantised form is small."""

from jax import lax
from jaxtyping import Array, Int

from pallas_kernels.quantised.array import Quantised
from pallas_kernels.quantised.format import UNIT

TILE_VALUES = 2**23  # dequantised at once: 16 MiB in 16 bits


def tile_rows(weight: Quantised) -> int:
    """Rows of a tile: all of them, or whole blocks of scales.

    Args:
      weight: one matrix.
    """
    rows, columns = weight.shape
    if rows * columns <= TILE_VALUES:
        return rows
    height = max(weight.format.block[0], UNIT if weight.format.layout == "hopper" else 1)
    return min(rows, max(TILE_VALUES // columns // height, 1) * height)


def rows_of(weight: Quantised, start: Int[Array, ""] | int, count: int) -> Quantised:
    """Some rows of a matrix, as a matrix.

    Args:
      weight: the matrix.
      start: the first of them, the first of a block of scales.
      count: how many; whole blocks, unless they are the last.
    """
    height = weight.format.block[0] or weight.shape[0]

    def of_blocks(scales: Array | None) -> Array | None:
        return None if scales is None else lax.dynamic_slice_in_dim(scales, start // height, -(-count // height))

    if weight.format.layout == "hopper":
        values = lax.dynamic_slice_in_dim(weight.values, start // UNIT, count // UNIT)
        # Four-bit values have their scales beside them.
        scales = of_blocks(weight.scales) if weight.format.codec == "fp8" else weight.scales
        assert scales is not None
        return Quantised(values, scales, weight.format)
    values = lax.dynamic_slice_in_dim(weight.values, start, count)
    scales, zero_points = of_blocks(weight.scales), of_blocks(weight.zero_points)
    assert scales is not None
    return Quantised(values, scales, weight.format, zero_points, weight.global_scale)

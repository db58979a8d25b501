"""Rows in registers, one to a warp: what is summed over a row never leaves its warp."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.portable.limits import LANES, ROWS


class Rows:
    """Four rows of a width that is a multiple of 32. Made inside a kernel."""

    def __init__(self, width: int):
        vector = 2 if width % (2 * LANES) == 0 else 1
        self.shape = ROWS, width
        self.layout = plgpu.Layout.TILED(
            plgpu.Tiling(((ROWS, LANES * vector), (vector,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
        )

    def load(self, ref: Any) -> Array:
        """`[4, width]` of memory."""
        return plgpu.load(ref, layout=self.layout, optimized=False)

    def load_in_bounds(self, ref: Any, first: Any) -> Array:
        """`[4, width]` of memory from a row on; behind its end, the last row again."""
        last = ref.shape[0] - 1
        number = plgpu.broadcasted_iota(jnp.int32, self.shape, 0, layout=self.layout)
        rows = self.load_for_each(ref.at[first])
        for row in range(1, ROWS):
            other = self.load_for_each(ref.at[jnp.minimum(first + row, last)])
            rows = jnp.where(number == row, other, rows)
        return rows

    def load_for_each(self, ref: Any) -> Array:
        """`[width]` of memory, the same for each row."""
        return lax.broadcast_in_dim(plgpu.load(ref, layout=self.layout.reduce(0), optimized=False), self.shape, (1,))

    def load_one_of_each(self, ref: Any) -> Array:
        """`[4]` of memory, a value of each row."""
        return plgpu.load(ref, layout=self.layout.reduce(1), optimized=False)

    def along(self, values: Array) -> Array:
        """One value a row, `[4]`, along each row."""
        return lax.broadcast_in_dim(values, self.shape, (0,))

    def columns(self, dtype: Any) -> Array:
        """The number of each column."""
        return plgpu.broadcasted_iota(dtype, self.shape, 1, layout=self.layout)


def compiler_params() -> plgpu.CompilerParams:
    """Of kernels whose warps share no memory."""
    return plgpu.CompilerParams(unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup)

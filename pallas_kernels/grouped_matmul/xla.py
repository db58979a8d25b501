"""Grouped matmul through XLA, on any device: a loop over the tiles in use.

The cost follows the routed rows. `jax.lax.ragged_dot` multiplies every row with every expert's weight where it has no
kernel of its own; `bench.py` compares the two.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.plan import RoutingPlan
from pallas_kernels.tiles import over_tiles


def grouped_matmul(
    x: Float[Array, "M in"], weights: Float[Array, "E out in"], plan: RoutingPlan, row_index: Int[Array, "P"] | None
) -> Float[Array, "P out"]:
    tiles = plan.tiles
    out = jnp.zeros((plan.order.shape[0], weights.shape[1]), jnp.float32)

    def tile(index, rows, old):
        del old
        own = x[rows if row_index is None else row_index[rows]]
        return batched_matmul_t(own, weights[tiles.expert[index]])

    return over_tiles(tiles, out, tile)


def matmul_t(x: Float[Array, "rows in"], weight: Float[Array, "out in"]) -> Float[Array, "rows out"]:
    """`x @ weight.T`, summed in float32; float32 inputs are multiplied as float32 (never TF32)."""
    return _dot(x, weight, (((1,), (1,)), ((), ())))


def batched_matmul_t(
    x: Float[Array, "chunk rows in"], weights: Float[Array, "chunk out in"]
) -> Float[Array, "chunk rows out"]:
    """`matmul_t` of each tile of a chunk with its own weight."""
    return _dot(x, weights, (((2,), (2,)), ((0,), (0,))))


def _dot(x: Array, weight: Array, dimensions: lax.DotDimensionNumbers) -> Array:
    return lax.dot_general(
        x,
        weight,
        dimensions,
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )

"""Grouped matmul through XLA, on any device: a loop over the tiles in use.

The cost follows the routed rows. `jax.lax.ragged_dot` multiplies every row with every expert's weight where it has no
kernel of its own; `bench.py` compares the two.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dot import batched_matmul_t
from pallas_kernels.plan import RoutingPlan
from pallas_kernels.tiles import over_tiles


def grouped_matmul(
    x: Float[Array, "M in"],
    weights: Float[Array, "E out in"],
    plan: RoutingPlan,
    row_index: Int[Array, "Q"] | None,
    bias: Float[Array, "E out"] | None = None,
) -> Float[Array, "Q out"]:
    tiles = plan.tiles
    out = jnp.zeros((plan.order.shape[0], weights.shape[1]), jnp.float32)

    def tile(index, rows, old):
        del old
        own = x[rows if row_index is None else row_index[rows]]
        y = batched_matmul_t(own, weights[tiles.expert[index]])
        return y if bias is None else y + bias[tiles.expert[index]].astype(jnp.float32)[:, None]

    return over_tiles(tiles, out, tile)

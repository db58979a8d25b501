"""Grouped matmul through XLA, on any device: a loop over the tiles in use.

The cost follows the routed rows. `jax.lax.ragged_dot` multiplies every row with every expert's weight where it has no
kernel of its own; `bench.py` compares the two.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_lora import xla as xla_lora
from pallas_kernels.grouped_matmul import unfused
from pallas_kernels.plan.api import RoutingPlan
from pallas_kernels.plan.tiles import Tiles
from pallas_kernels.quantised.api import dense
from pallas_kernels.quantised.array import Quantised
from pallas_kernels.varying import varying_as
from pallas_kernels.xla.dot import batched_matmul, batched_matmul_t, outer
from pallas_kernels.xla.tile_loop import over_tiles, window


def multiply(
    x: Float[Array, "M in"],
    weights: Float[Array, "E _out _in"] | Quantised,
    plan: RoutingPlan,
    row_index: Int[Array, "Q"] | None,
    bias: Float[Array, "E out"] | None = None,
    transposed: bool = False,
) -> Float[Array, "Q out"]:
    """`unfused.Multiply`."""
    out = jnp.zeros((plan.order.shape[0], weights.shape[2 if transposed else 1]), jnp.float32)
    return _multiply(plan.tiles, out, x, weights, row_index, bias, transposed)


# Jitted, so that projections of the same shapes share one trace.
@partial(jax.jit, static_argnames="transposed")
def _multiply(
    tiles: Tiles,
    out: Float[Array, "Q out"],
    x: Float[Array, "M in"],
    weights: Float[Array, "E _out _in"] | Quantised,
    row_index: Int[Array, "Q"] | None,
    bias: Float[Array, "E out"] | None,
    transposed: bool,
) -> Float[Array, "Q out"]:
    matmul = batched_matmul if transposed else batched_matmul_t

    def tile(index, rows, old):
        del old
        tile_x = x[rows if row_index is None else row_index[rows]]
        y = matmul(tile_x, dense(weights[tiles.expert[index]], x.dtype))
        return y if bias is None else y + bias[tiles.expert[index]].astype(jnp.float32)[:, None]

    return over_tiles(tiles, out, tile, (x, weights, row_index, bias))


def weight_gradient(x: Float[Array, "Q in"], dy: Float[Array, "Q out"], plan: RoutingPlan) -> Float[Array, "E out in"]:
    """`dW[e]`: the sum over an expert's rows of `dy[r].T x[r]`, in float32, tile by tile in sorted order."""

    def tile(index, total):
        expert, rows, others = window(plan.tiles, index, x, dy)
        return total.at[expert].add(outer(others, rows))

    shape = (plan.group_sizes.shape[0], dy.shape[1], x.shape[1])
    zeros = varying_as(jnp.zeros(shape, jnp.float32), x, dy, plan)
    return lax.fori_loop(0, plan.tiles.count.reshape(-1)[0], tile, zeros)


grouped_matmul = partial(unfused.grouped_matmul, multiply, xla_lora.grouped_lora)
gated_products = partial(unfused.gated_products, multiply, xla_lora.grouped_lora)
input_gradient = partial(unfused.input_gradient, multiply, xla_lora.grouped_lora)

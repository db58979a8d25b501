"""`dot.matmul_t` by a quantised weight: some of its rows are dequantised and multiplied, then the next.

A weight of one tile has the bits of the product with its dequantised form. Of a larger one the sums are the same, in
an order that XLA may choose by the tile's shape.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.gradients import no_gradient
from pallas_kernels.quantised.api import dequantise
from pallas_kernels.quantised.array import Quantised
from pallas_kernels.quantised.tiles import rows_of, tile_rows
from pallas_kernels.varying import varying_as
from pallas_kernels.xla import dot

ADVICE = "A quantised weight has no gradient: it is frozen; train adapters over it, or dequantise it."


def matmul_t(x: Float[Array, "rows in"], weight: Quantised) -> Float[Array, "rows out"]:
    """`x @ dequantise(weight).T`, multiplied and summed as `dot.matmul_t`; the weight is a constant.

    Args:
      x: the rows.
      weight: one matrix; it is dequantised to x's dtype.

    Raises:
      NotDifferentiable: when it is differentiated by the weight.
    """
    leaves, structure = jax.tree.flatten(no_gradient(ADVICE, weight))
    return _matmul_t(structure, *varying_as((x, leaves)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul_t(structure: jax.tree_util.PyTreeDef, x: Array, leaves: list[Array]) -> Array:
    weight: Quantised = jax.tree.unflatten(structure, leaves)

    def tile(y: Array, start: Int[Array, ""] | int, rows: Array) -> Array:
        product = dot.matmul_t(x, rows)
        return product if product.shape == y.shape else lax.dynamic_update_slice_in_dim(y, product, start, 1)

    return _over_tiles(weight, x, (x.shape[0], weight.shape[0]), tile)


def _forward(structure, x: Array, leaves: list[Array]) -> tuple[Array, tuple[list[Array], Array]]:
    return _matmul_t(structure, x, leaves), (leaves, x[:0])


def _backward(structure, kept: tuple[list[Array], Array], dy: Array) -> tuple[Array, list[None]]:
    leaves, like = kept
    weight: Quantised = jax.tree.unflatten(structure, leaves)
    dy = dy.astype(like.dtype)

    def tile(dx: Array, start: Int[Array, ""] | int, rows: Array) -> Array:
        part = lax.dynamic_slice_in_dim(dy, start, rows.shape[0], 1)
        product = dot.matmul(part, rows)
        return product if part.shape == dy.shape else dx + product

    dx = _over_tiles(weight, dy, (dy.shape[0], weight.shape[1]), tile)
    return dx.astype(like.dtype), [None] * len(leaves)


_matmul_t.defvjp(_forward, _backward)


def _over_tiles(
    weight: Quantised, x: Array, shape: tuple[int, int], tile: Callable[[Array, Int[Array, ""] | int, Array], Array]
) -> Array:
    """`tile(result so far, first row, dequantised rows)` of one tile after the other."""
    size = tile_rows(weight)
    whole, rest = divmod(weight.shape[0], size)

    def step(index: Int[Array, ""] | int, total: Array, count: int = size) -> Array:
        start = index * size
        return tile(total, start, dequantise(rows_of(weight, start, count), x.dtype))

    zeros = varying_as(jnp.zeros(shape, jnp.float32), x, weight)
    total = step(0, zeros) if whole == 1 else lax.fori_loop(0, whole, step, zeros)
    return step(whole, total, rest) if rest else total

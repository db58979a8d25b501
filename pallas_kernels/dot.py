"""Matmuls by the transposed weight, through XLA: float32 sums, and no TF32."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


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

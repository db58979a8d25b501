"""Matmuls by a weight or its transpose, through XLA: float32 sums, and no TF32."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.varying import varying_as


def matmul_t(x: Float[Array, "rows in"], weight: Float[Array, "out in"]) -> Float[Array, "rows out"]:
    """`x @ weight.T`, summed in float32; float32 inputs are multiplied as float32 (never TF32).

    Its cotangent is rounded to x's dtype before it is multiplied: 16-bit models stay on the tensor cores.
    """
    return _matmul_t(*varying_as((x, weight)))


@jax.custom_vjp
def _matmul_t(x: Array, weight: Array) -> Array:
    return _dot(x, weight, (((1,), (1,)), ((), ())))


def _matmul_t_forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return _matmul_t(x, weight), (x, weight)


def _matmul_t_backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, weight = kept
    dy = dy.astype(x.dtype)
    dx = _dot(dy, weight, (((1,), (0,)), ((), ())))
    return dx.astype(x.dtype), _dot(dy, x, (((0,), (0,)), ((), ()))).astype(weight.dtype)


_matmul_t.defvjp(_matmul_t_forward, _matmul_t_backward)


def matmul(x: Float[Array, "rows in"], weight: Float[Array, "in out"]) -> Float[Array, "rows out"]:
    """`x @ weight`, summed, multiplied and differentiated as `matmul_t`."""
    return _matmul(*varying_as((x, weight)))


@jax.custom_vjp
def _matmul(x: Array, weight: Array) -> Array:
    return _dot(x, weight, (((1,), (0,)), ((), ())))


def _matmul_forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return _matmul(x, weight), (x, weight)


def _matmul_backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, weight = kept
    dy = dy.astype(x.dtype)
    dx = _dot(dy, weight, (((1,), (1,)), ((), ())))
    return dx.astype(x.dtype), _dot(x, dy, (((0,), (0,)), ((), ()))).astype(weight.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


def batched_matmul_t(
    x: Float[Array, "chunk rows in"], weights: Float[Array, "chunk out in"]
) -> Float[Array, "chunk rows out"]:
    """`matmul_t` of each tile of a chunk with its own weight."""
    return _dot(x, weights, (((2,), (2,)), ((0,), (0,))))


def batched_matmul(
    x: Float[Array, "chunk rows in"], weights: Float[Array, "chunk in out"]
) -> Float[Array, "chunk rows out"]:
    """`x @ weight` of each tile of a chunk with its own weight."""
    return _dot(x, weights, (((2,), (1,)), ((0,), (0,))))


def outer(x: Float[Array, "rows left"], y: Float[Array, "rows right"]) -> Float[Array, "left right"]:
    """`x.T @ y`."""
    return _dot(x, y, (((0,), (0,)), ((), ())))


def _dot(x: Array, weight: Array, dimensions: lax.DotDimensionNumbers) -> Array:
    if jnp.float32 in (x.dtype, weight.dtype):  # a router that stays float32 in a 16-bit model
        x, weight = x.astype(jnp.float32), weight.astype(jnp.float32)
    return lax.dot_general(
        x,
        weight,
        dimensions,
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )

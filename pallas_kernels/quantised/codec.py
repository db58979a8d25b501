"""What a format is made of: how its bits become numbers, and how numbers become its bits."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.quantised.array import Quantised
from pallas_kernels.quantised.format import Format


@dataclass(frozen=True)
class Codec:
    """The meaning of bits.

    Attributes:
      values: float32 `[..., out, in]` of a `Quantised`, without their scales.
      scales: float32 scales of it, one per block.
      quantise: a `Quantised` of a float32 array, a format, and the dtype of scales that may have any.
      scales_dtype: in which scales are stored; None for any floating point.
      zero_points: it has them.
      global_scale: it has one.
    """

    values: Callable[[Quantised], Float[Array, "*lead out in"]]
    scales: Callable[[Quantised], Float[Array, "*lead rows columns"]]
    quantise: Callable[[Float[Array, "*lead out in"], Format, jax.typing.DTypeLike], Quantised]
    scales_dtype: str | None
    zero_points: bool = False
    global_scale: bool = False


def spread(scales: Array, block: tuple[int, int], shape: tuple[int, ...]) -> Array:
    """Scales `[..., rows, columns]` for each value of `shape`."""
    for axis, size in zip((-2, -1), block, strict=True):
        length = shape[axis]
        if size == 0 or scales.shape[axis] == 1:
            continue  # one for all: it is broadcast
        scales = jnp.repeat(scales, size, axis=axis)
        scales = scales[..., :length, :] if axis == -2 else scales[..., :length]
    return jnp.broadcast_to(scales, shape)


def blocks(array: Float[Array, "*lead out in"], block: tuple[int, int]) -> Float[Array, "*lead rows h columns w"]:
    """The array cut into blocks, zeros where the last ones end behind it."""
    *lead, out, width = array.shape
    h, w = block[0] or out, block[1] or width
    padded = jnp.pad(array, [(0, 0)] * len(lead) + [(0, -out % h), (0, -width % w)])
    return padded.reshape(*lead, padded.shape[-2] // h, h, padded.shape[-1] // w, w)


def largest(array: Float[Array, "*lead out in"], block: tuple[int, int]) -> Float[Array, "*lead rows columns"]:
    """The largest absolute value of each block."""
    return jnp.abs(blocks(array, block)).max(axis=(-3, -1))


def per(values: Float[Array, "*shape"], divisor: Array | float) -> Float[Array, "*shape"]:
    """`values / divisor`, rounded once whatever the shapes are: of a jit, of some rows, of a scalar divisor.

    XLA makes a division by one number a product with its rounded reciprocal, where it sees that it is one number.
    """
    return values / lax.optimization_barrier(jnp.broadcast_to(jnp.asarray(divisor, values.dtype), values.shape))

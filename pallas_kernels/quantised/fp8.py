"""fp8: e4m3 values and float32 scales, per block of a matrix, per row, or one for all of it.

e4m3 is `float8_e4m3fn`: no infinities, 448 is the largest number (arXiv:2209.05433, section 3.1). Its bits are kept as
uint8, because XLA for a CPU widens the whole of an fp8 array to take a part of it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels.quantised.array import Quantised
from pallas_kernels.quantised.codec import Codec, largest, per, spread
from pallas_kernels.quantised.format import Format

MAX_E4M3 = 448.0


def numbers_of(bits: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The float32 numbers of e4m3's bits."""
    return bits.view(jnp.float8_e4m3fn).astype(jnp.float32)


def bits_of(values: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """The bits of the nearest number of e4m3, ties to even, for values that it has numbers beside."""
    return values.astype(jnp.float8_e4m3fn).view(jnp.uint8)


def quantise(array: Float[Array, "*lead out in"], format: Format, scales_dtype: jax.typing.DTypeLike) -> Quantised:
    """The largest value of a block becomes 448, the others are rounded to the nearest number, ties to even."""
    most = largest(array, format.block)
    scales = jnp.where(most > 0, per(most, MAX_E4M3), 1.0)
    scaled = per(array, spread(scales, format.block, array.shape))
    # A quotient may round to a number behind 448, which e4m3 would make NaN.
    return Quantised(bits_of(jnp.clip(scaled, -MAX_E4M3, MAX_E4M3)), scales, format)


FP8 = Codec(
    values=lambda weight: numbers_of(weight.values),
    scales=lambda weight: weight.scales,
    quantise=quantise,
    scales_dtype="float32",
)

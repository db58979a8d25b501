"""nvfp4: e2m1 values, for each 16 of a row a scale in e4m3, and a float32 factor for the whole matrix."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.quantised import fp4
from pallas_kernels.quantised.array import Quantised
from pallas_kernels.quantised.codec import Codec, largest, per, spread
from pallas_kernels.quantised.format import Format
from pallas_kernels.quantised.fp8 import MAX_E4M3, bits_of, numbers_of


def scales(weight: Quantised) -> Float[Array, "*lead rows columns"]:
    """Float32 scales, the factor of the matrix included."""
    assert weight.global_scale is not None
    return numbers_of(weight.scales) * weight.global_scale[..., None, None]


def quantise(array: Float[Array, "*lead out in"], format: Format, scales_dtype: jax.typing.DTypeLike) -> Quantised:
    """The largest value of the matrix becomes 448 * 6; scales and values are rounded to the nearest, ties to even."""
    most = jnp.abs(array).max(axis=(-2, -1))
    whole = jnp.where(most > 0, per(most, MAX_E4M3 * fp4.MAX_E2M1), 1.0)
    wanted = per(per(largest(array, format.block), fp4.MAX_E2M1), whole[..., None, None])
    stored = bits_of(jnp.clip(wanted, 0.0, MAX_E4M3))
    empty = Quantised(jnp.zeros((), jnp.uint8), stored, format, global_scale=whole)
    divisor = spread(scales(empty), format.block, array.shape)
    scaled = jnp.where(divisor > 0, per(array, jnp.where(divisor > 0, divisor, 1.0)), 0.0)
    return Quantised(fp4.pack(fp4.encode(scaled)), stored, format, global_scale=whole)


NVFP4 = Codec(
    values=lambda weight: fp4.decode(fp4.nibbles(weight.values)),
    scales=scales,
    quantise=quantise,
    scales_dtype="uint8",
    global_scale=True,
)

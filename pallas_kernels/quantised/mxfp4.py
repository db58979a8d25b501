"""mxfp4: e2m1 values, and for each 32 of a row an exponent, e8m0: a power of two.

Source: OCP Microscaling Formats (MX) Specification 1.0, section 5.2.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.quantised import fp4
from pallas_kernels.quantised.array import Quantised
from pallas_kernels.quantised.codec import Codec, largest, per, spread
from pallas_kernels.quantised.format import Format

BIAS = 127
NOT_A_NUMBER = 255


def exponents(scales: Array) -> Float[Array, "*shape"]:
    """Float32 powers of two of e8m0 codes; 0, which stands for 2^-127, is zero, and 255 is infinite here."""
    return lax.bitcast_convert_type(scales.astype(jnp.int32) << 23, jnp.float32)


def quantise(array: Float[Array, "*lead out in"], format: Format, scales_dtype: jax.typing.DTypeLike) -> Quantised:
    """The smallest power of two that cuts nothing off; values are rounded to the nearest number, ties to even."""
    most = largest(array, format.block)
    bits = lax.bitcast_convert_type(per(most, fp4.MAX_E2M1), jnp.int32)
    codes = (bits >> 23) + ((bits & 0x7FFFFF) != 0).astype(jnp.int32)  # of the power of two that is not below
    scales = jnp.clip(codes, 1, NOT_A_NUMBER - 1).astype(jnp.uint8)
    scaled = per(array, spread(exponents(scales), format.block, array.shape))
    return Quantised(fp4.pack(fp4.encode(scaled)), scales, format)


MXFP4 = Codec(
    values=lambda weight: fp4.decode(fp4.nibbles(weight.values)),
    scales=lambda weight: exponents(weight.scales),
    quantise=quantise,
    scales_dtype="uint8",
)

"""Numbers of four bits: two a byte, and e2m1, whose magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4 and 6.

Source of e2m1: OCP Microscaling Formats (MX) Specification 1.0, section 5.3.3.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

MAX_E2M1 = 6.0


def nibbles(packed: UInt8[Array, "*lead half"]) -> UInt8[Array, "*lead columns"]:
    """The codes of packed values, the low bits of a byte first."""
    pairs = jnp.stack((packed & 0xF, packed >> 4), axis=-1)
    return pairs.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def pack(codes: UInt8[Array, "*lead columns"]) -> UInt8[Array, "*lead half"]:
    """Two codes a byte, as `nibbles` reads them."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def decode(codes: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The float32 numbers of e2m1 codes."""
    magnitude = (codes & 7).astype(jnp.int32)
    # Two bits of exponent and one of mantissa, moved to where float32 has them; its bias is 127 and e2m1's is 1.
    normal = lax.bitcast_convert_type((magnitude << 22) + (126 << 23), jnp.float32)
    number = jnp.where(magnitude < 2, 0.5 * magnitude.astype(jnp.float32), normal)
    return jnp.where(codes > 7, -number, number)


def encode(values: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """The nearest e2m1 codes, ties to the even code, beyond 6 that of 6."""
    size = jnp.abs(values)
    above = [size > 0.25, size >= 0.75, size > 1.25, size >= 1.75, size > 2.5, size >= 3.5, size > 5.0]
    magnitude = sum((step.astype(jnp.uint8) for step in above), jnp.zeros(values.shape, jnp.uint8))
    return magnitude | (jnp.signbit(values).astype(jnp.uint8) << 3)

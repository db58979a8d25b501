"""int4: codes 0 to 15, and for each group of a row's columns a scale, and the code that means zero or 8 for it."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.quantised import fp4
from pallas_kernels.quantised.array import Quantised
from pallas_kernels.quantised.codec import Codec, blocks, largest, per, spread
from pallas_kernels.quantised.format import Format

MIDDLE, LAST = 8, 15


def values(weight: Quantised) -> Float[Array, "*lead out in"]:
    """Codes as float32, counted from the one that means zero."""
    codes = fp4.nibbles(weight.values).astype(jnp.float32)
    if weight.zero_points is None:
        return codes - MIDDLE
    return codes - spread(weight.zero_points.astype(jnp.float32), weight.format.block, codes.shape)


def quantise(array: Float[Array, "*lead out in"], format: Format, scales_dtype: jax.typing.DTypeLike) -> Quantised:
    """The largest value of a group becomes 7, the others are rounded to the nearest, ties to even."""
    most = largest(array, format.block)
    scales, each = _stored(per(most, LAST - MIDDLE), scales_dtype)
    codes = jnp.round(per(array, spread(each, format.block, array.shape))) + MIDDLE
    return Quantised(fp4.pack(jnp.clip(codes, 0, LAST).astype(jnp.uint8)), scales, format)


def quantise_zero(array: Float[Array, "*lead out in"], format: Format, scales_dtype: jax.typing.DTypeLike) -> Quantised:
    """A group's smallest value becomes 0 and its largest 15, or zero where that lies outside of them."""
    cut = blocks(array, format.block)
    least, most = jnp.minimum(cut.min(axis=(-3, -1)), 0.0), jnp.maximum(cut.max(axis=(-3, -1)), 0.0)
    scales, each = _stored(per(most - least, LAST), scales_dtype)
    zero_points = jnp.clip(jnp.round(per(-least, each)), 0, LAST)
    codes = jnp.round(per(array, spread(each, format.block, array.shape)))
    codes = jnp.clip(codes + spread(zero_points, format.block, array.shape), 0, LAST)
    return Quantised(fp4.pack(codes.astype(jnp.uint8)), scales, format, zero_points=zero_points.astype(jnp.uint8))


def _stored(wanted: Array, dtype: jax.typing.DTypeLike) -> tuple[Array, Array]:
    """Scales as they are stored, 1 in place of zeros, and the float32 numbers that codes are then rounded by."""
    rounded = lax.optimization_barrier(wanted.astype(dtype))
    stored = jnp.where(rounded > 0, rounded, jnp.ones((), dtype))
    return stored, stored.astype(jnp.float32)


def scales(weight: Quantised) -> Float[Array, "*lead rows columns"]:
    """Scales as float32."""
    return weight.scales.astype(jnp.float32)


INT4 = Codec(values=values, scales=scales, quantise=quantise, scales_dtype=None)
INT4_ZERO = Codec(values=values, scales=scales, quantise=quantise_zero, scales_dtype=None, zero_points=True)

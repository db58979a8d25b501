"""The contract of quantised weights: their definition, and how to make them."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.errors import InputError
from pallas_kernels.quantised.array import Quantised, Weights
from pallas_kernels.quantised.codec import Codec, spread
from pallas_kernels.quantised.format import FORMATS, Format
from pallas_kernels.quantised.fp8 import FP8
from pallas_kernels.quantised.int4 import INT4, INT4_ZERO
from pallas_kernels.quantised.mxfp4 import MXFP4
from pallas_kernels.quantised.nvfp4 import NVFP4
from pallas_kernels.quantised.packing import PLACEMENTS, unit_shape, unpack

CODECS: Mapping[str, Codec] = {"fp8": FP8, "mxfp4": MXFP4, "int4": INT4, "int4_zero": INT4_ZERO, "nvfp4": NVFP4}


def dequantise(weight: Quantised, dtype: jax.typing.DTypeLike) -> Float[Array, "*lead out in"]:
    """The numbers that a quantised weight holds: `(value - zero point) * scale` in float32, rounded once to `dtype`.

    A layer over the weight gives what a layer over this array gives. Numbers below 2^-124, near the end of float32, may
    be zero.

    Args:
      weight: the weight, or a stack of them.
      dtype: of the result.

    Returns:
      `[..., out, in]`.
    """
    if weight.format.layout != "rows":
        weight = unpack(weight)
    codec = CODECS[weight.format.codec]
    numbers = codec.values(weight) * spread(codec.scales(weight), weight.format.block, weight.shape)
    # Behind the barrier XLA cannot leave the rounding out, as it does where float32 is rounded and widened again.
    return lax.optimization_barrier(numbers.astype(dtype))


def dense(weight: Weights, dtype: jax.typing.DTypeLike) -> Float[Array, "*lead out in"]:
    """An array as it is, a quantised weight dequantised: for the tile that is multiplied next.

    Args:
      weight: of either kind.
      dtype: what a quantised weight becomes.
    """
    return dequantise(weight, dtype) if isinstance(weight, Quantised) else weight


def quantise(
    array: Float[Array, "*lead out in"], format: Format | str, scales_dtype: jax.typing.DTypeLike = jnp.float32
) -> Quantised:
    """A weight, or a stack of them, in a format: values are rounded to the nearest number that it has, ties to even.

    The scale of a block follows from its largest value, which is never cut off: it becomes 448 (fp8), 7 (int4), at most
    6 (mxfp4, nvfp4), or 0 and 15 are the smallest and the largest one (int4 with zero points).

    Args:
      array: `[..., out, in]`, floating point and finite.
      format: the format, or its name.
      scales_dtype: of int4's scales, which are rounded to it before values are. Other formats have one of their own.

    Raises:
      InputError: a format that is not known, or that the array's columns do not fit.
    """
    if isinstance(format, str):
        if format not in FORMATS:
            raise InputError(f"The format is {format!r}; expected one of {', '.join(FORMATS)}.")
        format = FORMATS[format]
    codec = CODECS[format.codec]
    if array.ndim < 2 or not jnp.issubdtype(array.dtype, jnp.floating):
        raise InputError(f"The weight is {array.dtype} {list(array.shape)}; expected floating point [..., out, in].")
    width = format.block[1]
    if format.per_byte == 2 and (array.shape[-1] % 2 or (width and array.shape[-1] % width)):
        raise InputError(f"The weight has {array.shape[-1]} columns; {format.name} takes multiples of {width or 2}.")
    return codec.quantise(array.astype(jnp.float32), format, scales_dtype)


def check(name: str, weight: Quantised) -> None:
    """Refuses a quantised weight whose arrays do not belong together.

    Args:
      name: what errors call it.
      weight: the weight, its arrays traced or not.

    Raises:
      InputError: an array that is missing, surplus, or of another shape or dtype, by name.
    """
    codec, form = CODECS.get(weight.format.codec), weight.format
    if codec is None:
        raise InputError(f"{name} has the codec {form.codec!r}; expected one of {', '.join(CODECS)}.")
    if form.layout != "rows":
        return _check_packed(name, weight)
    if weight.ndim < 2 or weight.values.dtype != jnp.uint8:
        raise InputError(f"{name}.values are {_shown(weight.values)}; expected uint8 [..., out, in].")
    shape = (*weight.shape[:-2], *form.scales_shape(*weight.shape[-2:]))
    dtype = weight.scales.dtype
    wanted_dtype = codec.scales_dtype
    fits = dtype == wanted_dtype if wanted_dtype else jnp.issubdtype(dtype, jnp.floating)
    if weight.scales.shape != shape or not fits:
        wanted = f"{wanted_dtype or 'floating point'} {list(shape)}"
        raise InputError(f"{name}.scales are {_shown(weight.scales)}; expected {wanted} for {form.name}.")
    for part, has, wanted_shape, of in (
        ("zero_points", codec.zero_points, shape, "uint8"),
        ("global_scale", codec.global_scale, weight.shape[:-2], "float32"),
    ):
        array = getattr(weight, part)
        if has != (array is not None) or (has and (array.shape != wanted_shape or array.dtype != of)):
            came = "missing" if array is None else f"{_shown(array)}"
            wanted = f"{of} {list(wanted_shape)}" if has else "none"
            raise InputError(f"{name}.{part} is {came}; expected {wanted} for {form.name}.")


def _check_packed(name: str, weight: Quantised) -> None:
    """`check` of a weight that `pack` made."""
    if weight.format.codec not in PLACEMENTS:
        raise InputError(
            f"{name} is {weight.format.name} in the layout of the Hopper kernels, which have no form for it."
        )
    lead = weight.values.shape[:-4]
    unit = unit_shape(weight.format)
    if weight.values.ndim < 4 or weight.values.dtype != jnp.int32 or weight.values.shape[-2:] != unit:
        raise InputError(f"{name}.values are {_shown(weight.values)}; expected int32 [..., {unit[0]}, {unit[1]}].")
    shape = (*lead, *weight.format.scales_shape(*weight.shape[-2:])) if weight.format.codec == "fp8" else (*lead, 0, 0)
    in_float32 = weight.format.codec != "fp8" or weight.scales.dtype == jnp.float32
    if weight.scales.shape != shape or not in_float32:
        raise InputError(
            f"{name}.scales are {_shown(weight.scales)}; expected {'float32 ' if shape[-1] else ''}{list(shape)}, as "
            "pack makes them."
        )
    for part in ("zero_points", "global_scale"):
        if getattr(weight, part) is not None:
            raise InputError(f"{name}.{part} is there; expected none beside packed values, which hold zero points.")


def _shown(array: Array) -> str:
    return f"{array.dtype} {list(array.shape)}"

"""The gated unit's activations: one table, from the name to the function of both factors.

`Activation` lists the same names without jax (`constants.py`), for configs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.constants import SWIGLU_ALPHA, SWIGLU_LIMIT, Activation
from pallas_kernels.errors import InputError

Factor = Float[Array, "*rows width"]


def _silu(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up


def _gelu_tanh(gate: Array, up: Array) -> Array:
    return jax.nn.gelu(gate, approximate=True) * up


def _clamped_swiglu(gate: Array, up: Array) -> Array:
    """`g * sigmoid(alpha * g) * (u + 1)`, with g clamped from above and u on both sides.

    Source: `GptOssExperts` of transformers.
    """
    gate, up = jnp.minimum(gate, SWIGLU_LIMIT), jnp.clip(up, -SWIGLU_LIMIT, SWIGLU_LIMIT)
    return gate * jax.nn.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)


# Elementwise, of float32: kernels call them on registers, and a backward pass differentiates them.
ACTIVATIONS: dict[Activation, Callable[[Array, Array], Array]] = {
    "silu": _silu,
    "gelu_tanh": _gelu_tanh,
    "clamped_swiglu": _clamped_swiglu,
}


def gated_unit(activation: Activation, gate: Factor, up: Factor) -> Factor:
    """`activation(gate) * up`, or what the activation makes of both factors.

    Args:
      activation: a name in `ACTIVATIONS`.
      gate: `[..., width]`, gate's product.
      up: `[..., width]`, up's product.

    Returns:
      `[..., width]`.

    Raises:
      InputError: no activation has this name.
    """
    if activation not in ACTIVATIONS:
        raise InputError(f"activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[activation](gate, up)

"""The gated unit's activations, by name."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.constants import Activation

# Those of the form `activation(gate) * up`.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0


def gated_unit(
    activation: Activation, gate: Float[Array, "rows width"], up: Float[Array, "rows width"]
) -> Float[Array, "rows width"]:
    """`activation(gate) * up`; for `clamped_swiglu` `g * sigmoid(alpha * g) * (u + 1)`, g and u the clamped factors.

    Source of the latter: `GptOssExperts` of transformers, which clamps gate from above and up on both sides.
    """
    if activation == "clamped_swiglu":
        gate, up = jnp.minimum(gate, SWIGLU_LIMIT), jnp.clip(up, -SWIGLU_LIMIT, SWIGLU_LIMIT)
        return gate * jax.nn.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)
    return ACTIVATIONS[activation](gate) * up

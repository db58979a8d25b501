"""The gated unit's activations, by name: `activation(gate) * up`."""

from collections.abc import Callable
from typing import Literal

import jax
from jaxtyping import Array

Activation = Literal["silu", "gelu_tanh"]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}

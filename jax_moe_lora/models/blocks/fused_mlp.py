"""A gated MLP whose gate and up are one projection (`specs/fused_mlp.py`): forward pass."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_moe_lora.models.blocks.context import StepContext, linear
from jax_moe_lora.models.params import LayerParams
from jax_moe_lora.models.specs.fused_mlp import FusedMLP
from pallas_kernels.activations import gated_unit
from pallas_kernels.ops import LayerPages


def forward(
    spec: FusedMLP, weights: LayerParams, adapters: LayerPages, x: Float[Array, "B T D"], step: StepContext
) -> Float[Array, "B T D"]:
    """`out(activation(first half) * second half)` of `in(x)`.

    Args:
      spec: the block's.
      weights: the layer's arrays.
      adapters: the layer's pages.
      x: `[B, T, D]`.
      step: what every layer reads.
    """
    gate, up = jnp.split(linear("shared_in", weights, adapters, x, step), 2, axis=-1)
    return linear("shared_out", weights, adapters, gated_unit(spec.activation, gate, up), step)

"""A gated MLP that every token goes through (`specs/mlp.py`): forward pass."""

from jaxtyping import Array, Float

from jax_moe_lora.models.blocks.context import StepContext, linear, linears
from jax_moe_lora.models.params import LayerParams
from jax_moe_lora.models.specs.mlp import DenseMLP
from pallas_kernels.activations import gated_unit
from pallas_kernels.ops import LayerPages


def forward(
    spec: DenseMLP, weights: LayerParams, adapters: LayerPages, x: Float[Array, "B T D"], step: StepContext
) -> Float[Array, "B T D"]:
    """`down(activation(gate(x)) * up(x))`.

    Args:
      spec: the block's.
      weights: the layer's arrays.
      adapters: the layer's pages.
      x: `[B, T, D]`.
      step: what every layer reads.
    """
    gate, up = linears((f"{spec.modules}_gate", f"{spec.modules}_up"), weights, adapters, x, step)
    return linear(f"{spec.modules}_down", weights, adapters, gated_unit(spec.activation, gate, up), step)

"""Routed experts, with a shared one beside them (`specs/mlp.py`): forward pass."""

from dataclasses import replace

import jax
from jax import lax
from jaxtyping import Array, Float, Int

from jax_moe_lora.adapters.lora import EXPERT_MODULES
from jax_moe_lora.layer.moe import choose_experts, routed_experts, router_scores
from jax_moe_lora.models.blocks.context import Routing, StepContext, linear
from jax_moe_lora.models.blocks.partial_sums import EXPERT_AXIS, added_once, total
from jax_moe_lora.models.blocks.shared import SHARED
from jax_moe_lora.models.params import LayerParams
from jax_moe_lora.models.specs.mlp import RoutedMLP
from pallas_kernels.ops import LayerPages, choose
from pallas_kernels.routed_experts.weights import ExpertWeights


def forward(
    spec: RoutedMLP,
    weights: LayerParams,
    adapters: LayerPages,
    x: Float[Array, "B T D"],
    step: StepContext,
    chosen: Int[Array, "N K"] | None = None,
) -> tuple[Float[Array, "B T D"], Routing]:
    """Each token through its experts, and through the shared one.

    Args:
      spec: the block's.
      weights: the layer's arrays.
      adapters: the layer's pages.
      x: `[B, T, D]`.
      step: what every layer reads.
      chosen: int32 `[B * T, K]`, the experts of each token in place of those that the router would choose; it still
        weighs them.

    Returns:
      `[B, T, D]`, and what the router decided.
    """
    flat = x.reshape(-1, x.shape[-1])
    scores = router_scores(flat, weights["router"], adapters, step.slots, step.implementation)
    bias = weights.get("choice_bias" if spec.choice_bias else "router_bias")
    bias = None if bias is None else bias.reshape(-1)
    backend = choose(step.implementation, dtype=x.dtype).picked
    shares, experts = choose_experts(scores, spec.moe, bias, step.row_mask.reshape(-1), chosen, backend=backend)
    routing = Routing(scores, experts, shares)
    y = run_experts(spec, weights, adapters, flat, routing, step).reshape(x.shape)
    if spec.shared is None:
        return total(y), routing
    shared = SHARED[type(spec.shared)].forward(spec.shared, weights, adapters, x, step)
    if spec.shared_gate:
        shared = jax.nn.sigmoid(linear("shared_expert_gate", weights, adapters, x, step)) * shared
    return total(y, shared), routing


def run_experts(
    spec: RoutedMLP,
    weights: LayerParams,
    adapters: LayerPages,
    x: Float[Array, "N D"],
    routing: Routing,
    step: StepContext,
) -> Float[Array, "N D"]:
    """Rows through the chosen experts; on a mesh a partial sum: that of the experts, and of their columns, held here.

    Args:
      spec: the block's.
      weights: the layer's arrays.
      adapters: the layer's pages.
      x: `[N, D]`.
      routing: what the router decided.
      step: what every layer reads.
    """
    biases = (added_once(weights.get(f"{part}_bias"), weights[part]) for part in EXPERT_MODULES)
    experts = ExpertWeights(*(weights[part] for part in EXPERT_MODULES), *biases)
    count, width, _ = experts.gate.shape
    chosen = routing.experts
    if count < spec.moe.num_experts:  # those of other devices are outside 0 .. count - 1, and are skipped
        chosen = chosen - lax.axis_index(EXPERT_AXIS) * count
    return routed_experts(
        x,
        routing.weights,
        chosen,
        experts,
        replace(spec.moe, num_experts=count, expert_width=width),
        adapters.only(EXPERT_MODULES),
        step.slots,
        step.implementation,
        step.remat,
    )

"""A layer of Gemma 4 (`specs/gemma4.py`): forward pass.

Letters: B requests, T tokens of a request, N rows of the step.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_moe_lora.layer.moe import choose_experts, router_scores
from jax_moe_lora.models.blocks import dense_mlp, gemma4_attention
from jax_moe_lora.models.blocks.cache_places import LayerCache
from jax_moe_lora.models.blocks.context import Routing, StepContext
from jax_moe_lora.models.blocks.norm import norm_named, rms_norm
from jax_moe_lora.models.blocks.partial_sums import total_of_each
from jax_moe_lora.models.blocks.routed_mlp import run_experts
from jax_moe_lora.models.params import LayerParams
from jax_moe_lora.models.specs.gemma4 import Gemma4Layer
from pallas_kernels.ops import LayerPages, choose


def forward(
    spec: Gemma4Layer,
    weights: LayerParams,
    adapters: LayerPages,
    hidden: Float[Array, "B T D"],
    step: StepContext,
    cache: LayerCache | None,
    chosen: Int[Array, "N K"] | None = None,
) -> tuple[Float[Array, "B T D"], LayerCache | None, Routing]:
    """Attention, the dense MLP beside the routed experts, and the layer's scalar on all of it.

    Args:
      spec: the layer's.
      weights: its arrays.
      adapters: its pages.
      hidden: `[B, T, D]`.
      step: what every layer reads.
      cache: the layer's, or None to keep none.
      chosen: int32 `[N, K]`, the experts of each token in place of those that the router would choose.

    Returns:
      The hidden rows, the cache with the step's tokens in it, and what the router decided.
    """

    def norm(name: str, x: Array) -> Array:
        return norm_named(spec.norm, x, weights, name)

    mixed, cache = gemma4_attention.forward(
        spec.attention, weights, adapters, norm("attention_norm", hidden), step, cache
    )
    hidden = hidden + norm("attention_post_norm", mixed)
    dense = dense_mlp.forward(spec.dense, weights, adapters, norm("mlp_norm", hidden), step)
    routing = _route(spec, weights, adapters, hidden, step, chosen)
    rows = norm("routed_norm", hidden).reshape(-1, hidden.shape[-1])
    routed = run_experts(spec.mlp, weights, adapters, rows, routing, step).reshape(hidden.shape)
    dense, routed = total_of_each(dense, routed)
    both = norm("mlp_post_norm", dense) + norm("routed_post_norm", routed)
    hidden = hidden + norm("sum_post_norm", both)
    return hidden * weights["layer_scalar"][None, None], cache, routing


def _route(
    spec: Gemma4Layer,
    weights: LayerParams,
    adapters: LayerPages,
    hidden: Float[Array, "B T D"],
    step: StepContext,
    chosen: Int[Array, "N K"] | None,
) -> Routing:
    """The router reads the residual through a norm without weight; each expert's weight has a factor of its own."""
    rows = rms_norm(hidden.reshape(-1, hidden.shape[-1]), None, spec.norm.eps)
    rows = rows * weights["router_scale"][None] * jnp.asarray(hidden.shape[-1] ** -0.5, rows.dtype)
    scores = router_scores(rows, weights["router"], adapters, step.slots, step.implementation)
    backend = choose(step.implementation, dtype=rows.dtype).picked
    shares, experts = choose_experts(scores, spec.mlp.moe, None, step.row_mask.reshape(-1), chosen, backend=backend)
    # Padding has an expert that is not there.
    factor = weights["per_expert_scale"].astype(shares.dtype).at[experts].get(mode="fill", fill_value=0)
    return Routing(scores, experts, shares * factor)

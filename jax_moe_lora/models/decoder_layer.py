"""One decoder layer: attention and an MLP, each behind a norm, or before one, and with a residual.

Letters: B requests, T tokens of a request, N rows of the step.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jax_moe_lora.models.blocks import dense_mlp, routed_mlp
from jax_moe_lora.models.blocks.cache_places import LayerCache
from jax_moe_lora.models.blocks.context import Routing, StepContext
from jax_moe_lora.models.blocks.norm import norm_named
from jax_moe_lora.models.blocks.partial_sums import total
from jax_moe_lora.models.blocks.registry import ATTENTION, LAYERS
from jax_moe_lora.models.params import LayerParams
from jax_moe_lora.models.specs.mlp import DenseMLP
from jax_moe_lora.models.specs.model import Layer, LayerSpec
from pallas_kernels.ops import LayerPages
from pallas_kernels.pages import NO_ADAPTERS


@partial(jax.jit, static_argnames="spec")
def run_layer(
    spec: Layer,
    layer: LayerParams,
    adapters: LayerPages | None,
    hidden: Float[Array, "B T D"],
    step: StepContext,
    cache: LayerCache | None,
    chosen: Int[Array, "N K"] | None = None,
) -> tuple[Float[Array, "B T D"], LayerCache | None, Routing | None]:
    """One decoder layer: attention, then its MLP, each with norms and a residual.

    Args:
      spec: the layer's (static).
      layer: its arrays.
      adapters: its pages, from `Bank.layer`, or None for the base model.
      hidden: `[B, T, D]`.
      step: what every layer reads.
      cache: the layer's, or None to keep none.
      chosen: int32 `[N, K]`, the experts of each token in place of those that the router would choose.

    Returns:
      The hidden rows, the cache with the step's tokens in it, and where `step.keep_routing` what the router decided
      (None in a layer without a router).
    """
    adapters = NO_ADAPTERS if adapters is None else adapters
    if not isinstance(spec, LayerSpec):
        hidden, cache, routing = LAYERS[type(spec)].forward(spec, layer, adapters, hidden, step, cache, chosen)
        return hidden, cache, routing if step.keep_routing else None
    mixed, cache = ATTENTION[type(spec.attention)].forward(
        spec.attention, layer, adapters, _before(spec, layer, "attention", hidden), step, cache
    )
    hidden = hidden + _after(spec, layer, "attention", mixed)
    x = _before(spec, layer, "mlp", hidden)
    routing = None
    if isinstance(spec.mlp, DenseMLP):
        y = total(dense_mlp.forward(spec.mlp, layer, adapters, x, step))
    else:
        y, routing = routed_mlp.forward(spec.mlp, layer, adapters, x, step, chosen)
    return hidden + _after(spec, layer, "mlp", y), cache, routing if step.keep_routing else None


def _before(spec: LayerSpec, layer: LayerParams, block: str, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    y = x if spec.norms == "after" else norm_named(spec.norm, x, layer, f"{block}_norm")
    # Several projections read it: without a barrier XLA makes parts of it again in each of them.
    return lax.optimization_barrier(y)


def _after(spec: LayerSpec, layer: LayerParams, block: str, y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    if spec.norms != "before":
        y = norm_named(spec.norm, y, layer, f"{block}_post_norm")
    if spec.residual_scale == 1.0:
        return y
    return (y.astype(jnp.float32) * spec.residual_scale).astype(y.dtype)  # 0.22 has no 16-bit neighbour near enough

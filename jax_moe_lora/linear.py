"""Multi-LoRA for dense projections: attention, router, head. One "expert" that every row goes to."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import Implementation, LoRAPages, RoutingPlan, grouped_lora, make_plan
from pallas_kernels.dot import matmul_t


def dense_plan(slots: Int[Array, "T"], num_slots: int) -> RoutingPlan:
    """The plan that `lora_linear` reads: rows sorted by slot. One serves all dense projections of a step."""
    return make_plan(jnp.zeros((slots.shape[0], 1), jnp.int32), slots, 1, num_slots)


def lora_linear(
    x: Float[Array, "T in"],
    weight: Float[Array, "out in"],
    bias: Float[Array, "out"] | None = None,
    pages: LoRAPages | None = None,
    plan: RoutingPlan | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "T out"]:
    """`x @ weight.T + bias`, plus each row's own adapter.

    Args:
      x: `[T, in]`. weight: `[out, in]`. bias: `[out]` or None.
      pages: the projection's adapters, or None for none; plan: `dense_plan` of the rows' slots.

    Returns:
      float32 `[T, out]`; rows without an adapter have the bits that they have with `pages=None`.
    """
    # The barrier keeps XLA from folding what follows into the matmul, which would round base rows otherwise.
    y = lax.optimization_barrier(matmul_t(x, weight))
    if pages is not None and plan is not None:
        adapted = grouped_lora(y[plan.order], x, pages, plan, plan.token, implementation)
        y = lax.optimization_barrier(adapted[plan.position])
    return y if bias is None else y + bias.astype(jnp.float32)[None]

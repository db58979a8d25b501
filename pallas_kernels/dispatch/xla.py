"""Dispatch through XLA, on any device: a gather, and back a loop over a token's experts."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.plan.api import RoutingPlan


def token_rows(x: Float[Array, "T width"], plan: RoutingPlan, *, clear: bool = True) -> Float[Array, "Q width"]:
    """What `api.token_rows` promises; rows of no pair repeat token 0's."""
    del clear
    return x[plan.token]


def weighted_sum(
    rows: Float[Array, "Q width"], weights: Float[Array, "T K"], position: Int[Array, "T K"], live: Bool[Array, "T K"]
) -> Float[Array, "T width"]:
    """What `api.combine` promises, one expert after the other: on a CPU `[T, K, width]` at once would be written out.

    Args:
      rows: as in `api.combine`.
      weights: as there.
      position: sorted row of each pair.
      live: False for skipped pairs, whose row is undefined.
    """
    total = jnp.zeros((weights.shape[0], rows.shape[1]), jnp.float32)
    for k in range(weights.shape[1]):
        # Twice: a gradient of zero times NaN is NaN.
        row = jnp.where(live[:, k : k + 1], rows[position[:, k]].astype(jnp.float32), 0.0)
        total = total + jnp.where(live[:, k : k + 1], weights[:, k : k + 1] * row, 0.0)
    return total

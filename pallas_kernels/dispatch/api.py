"""From tokens to the sorted rows of their experts (`token_rows`), and back (`combine`)."""

from jaxtyping import Array, Bool, Float

from pallas_kernels.backend import BACKENDS
from pallas_kernels.gradients import no_gradient
from pallas_kernels.plan.api import RoutingPlan

ADVICE = (
    "token_rows has no gradient of its own: differentiate routed_experts, the whole layer, "
    "or call combine on the rows' cotangents."
)


def token_rows(x: Float[Array, "T width"], plan: RoutingPlan, *, clear: bool = True) -> Float[Array, "Q width"]:
    """Each sorted row's token.

    Args:
      x: `[T, width]`, one row per token.
      plan: as `make_plan` made it.
      clear: rows between experts are finite, as a contraction over whole windows of rows needs them; else undefined.

    Returns:
      `[Q, width]`.

    Raises:
      NotDifferentiable: when it is differentiated; see `routed_experts`.
    """
    return BACKENDS[plan.backend].module("dispatch").token_rows(no_gradient(ADVICE, x), plan, clear=clear)


def combine(rows: Float[Array, "Q width"], weights: Float[Array, "T K"], plan: RoutingPlan) -> Float[Array, "T width"]:
    """Sums each token's rows by router weight, in float32 and in an order that shapes decide; skipped pairs give zeros.

    Args:
      rows: `[Q, width]`, in sorted order.
      weights: float32 `[T, K]`, router weights.
      plan: as `make_plan` made it.

    Returns:
      float32 `[T, width]`.
    """
    tokens, top_k = weights.shape
    position, live = plan.position.reshape(tokens, top_k), routed(plan).reshape(tokens, top_k)
    return BACKENDS[plan.backend].module("dispatch").weighted_sum(rows, weights, position, live)


def routed(plan: RoutingPlan) -> Bool[Array, "P"]:
    """The pairs that the plan does not skip."""
    if plan.token_tiles is not None:
        return plan.position < plan.tiles.count[0] * plan.tiles.size
    return plan.position < plan.group_starts[-1] + plan.group_sizes[-1]

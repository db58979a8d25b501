"""The contract of the grouped matmul, and its dispatch."""

from jaxtyping import Array, Float, Int

from pallas_kernels.backend import Implementation, choose
from pallas_kernels.grouped_matmul import reference, xla
from pallas_kernels.plan import RoutingPlan

_BACKENDS = {"xla": xla.grouped_matmul, "reference": reference.grouped_matmul}


def grouped_matmul(
    x: Float[Array, "M in"],
    weights: Float[Array, "E out in"],
    plan: RoutingPlan,
    row_index: Int[Array, "P"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "P out"]:
    """`y[r] = x[row_index[r]] @ weights[expert of r].T` for each sorted row r of the plan.

    Args:
      x: `[M, in]`, the rows. weights: `[E, out, in]`, one matrix an expert, of x's dtype.
      row_index: int32 `[P]`, the row of x that sorted row r reads (`plan.token` for token rows); None reads row r.
      implementation: a backend by name, or None for the best that is available.

    Returns:
      float32 `[P, out]` (sums are kept in float32); zeros for rows that the plan skips. A row's bits depend on its
      own inputs and on static shapes alone, never on the other rows' routing or slots.

    Raises:
      UnsupportedImplementation: see `backend.choose`.
    """
    return _BACKENDS[choose(implementation).picked](x, weights, plan, row_index)

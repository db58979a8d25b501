"""The contract of the grouped LoRA op and of its parts, and which backend runs them."""

from collections.abc import Sequence

from jaxtyping import Array, Float, Int

from pallas_kernels.backend import BACKENDS, Implementation, backend_for_plan
from pallas_kernels.gradients import no_gradient
from pallas_kernels.lora_steps.api import LoRASteps, Shrunk, has_adapters, make_lora_steps
from pallas_kernels.pages import LayerPages, LoRAPages
from pallas_kernels.plan.api import RoutingPlan

PageGradients = tuple[Float[Array, "_pages 16 in"], Float[Array, "_pages 16 _out"]]

ADVICE = (
    "{} has no gradient of its own: differentiate routed_experts, the whole layer, "
    "or call input_gradient and page_gradients."
)


def grouped_lora(
    y: Float[Array, "Q out"],
    x: Float[Array, "M in"],
    pages: LoRAPages,
    plan: RoutingPlan,
    row_index: Int[Array, "Q"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "Q out"]:
    """`y[r] + scale[s, e] * (x[row_index[r]] @ A[s, e].T) @ B[s, e].T` for each sorted row r with expert e and slot s.

    The GPU kernels have this inside `grouped_matmul`; on its own the op is there for "xla" and "reference".

    Args:
      y: float32 `[Q, out]`, the base projection in sorted order.
      x: `[M, in]`.
      pages: the projection's adapters; the plan must have been made with its number of slots.
      plan: as `make_plan` made it.
      row_index: int32 `[Q]`, the row of x that sorted row r reads; None reads row r.
      implementation: a backend by name, or None for the plan's.

    Returns:
      float32 `[Q, out]`. Rows without an adapter keep the bits of y. A row's bits depend on its own inputs, its own
      adapter and on static shapes alone; an adapter costs the pages it has, whatever the largest rank is.

    Raises:
      UnsupportedImplementation: the backend is unknown, has no such op, or cannot read the plan.
      NotDifferentiable: when it is differentiated; see `routed_experts`.
    """
    backend = backend_for_plan(plan.backend, implementation, "grouped_lora")
    y, x, pages = no_gradient(ADVICE.format("grouped_lora"), (y, x, pages))
    return backend.module("grouped_lora").grouped_lora(y, x, pages, plan, row_index)


def shrink(
    x: Float[Array, "Q in"], adapters: LayerPages | None, plan: RoutingPlan, steps: LoRASteps | None = None
) -> Shrunk | None:
    """`scale * x[r] @ A.T` of each sorted row's own adapter, for whoever multiplies by B more than once.

    Args:
      x: rows in sorted order.
      adapters: of one projection, or of two that share their input.
      plan: as `make_plan` made it.
      steps: as `make_lora_steps` made them.

    Returns:
      What `grouped_matmul`, `input_gradient` and `page_gradients` take; None without adapters, and where the backend
      multiplies A and B in one go.

    Raises:
      NotDifferentiable: when it is differentiated; see `routed_experts`.
    """
    backend = BACKENDS[plan.backend]
    if not (has_adapters(adapters) and backend.has("shrink")):
        return None
    x, adapters = no_gradient(ADVICE.format("shrink"), (x, adapters))
    if steps is None:
        (steps,) = make_lora_steps(plan, (adapters,))
    return backend.module("shrink").shrink_adapters(x, adapters, plan.tiles, steps)


def page_gradients(
    x: Float[Array, "Q in"],
    dys: Sequence[Float[Array, "Q _out"]],
    adapters: LayerPages | None,
    plan: RoutingPlan,
    implementation: Implementation | None = None,
    *,
    share: Float[Array, "Q"] | None = None,
    shrunk: tuple[Shrunk | None, Sequence[Shrunk | None]] = (None, ()),
) -> list[PageGradients | None]:
    """Cotangents of the pages of `y[r] += scale[s, e] * (x[r] @ A[s, e].T) @ B[s, e].T`, for `dy` that of y.

    Args:
      x: rows in sorted order; those of no pair are finite (`token_rows`).
      dys: cotangents of y in sorted order, one for each projection; those of no pair are finite.
      adapters: of one projection, or of two that share x.
      plan: as `make_plan` made it. With hopper, experts that share a page have no other pages between them, as in a
        matrix that all share. The ranks that a matrix's last page is filled up with get zeros.
      implementation: a backend by name, or None for the plan's.
      share: float32 `[Q]`, a factor on each row's term, or None for ones.
      shrunk: where they are there already, `shrink` of x by these adapters, and of each dy by the transposed ones (by
        the steps of the former, `LoRASteps.transposed`).

    Returns:
      For each of the adapters the sums of A and of B, None for none: float32, in the shapes of `pages.a` and `pages.b`,
      of each page the sum over the rows and experts that use it (`dA = sum scale * (dy B).T x`,
      `dB = sum scale * (x A.T).T dy`), zeros for a page that no row uses. Sums run in sorted order: the same bits
      every time.

    Raises:
      UnsupportedImplementation: the backend is unknown, or cannot read the plan.
      NotDifferentiable: when it is differentiated: there are no second derivatives.
    """
    backend = backend_for_plan(plan.backend, implementation).for_op("page_gradients")
    if not has_adapters(adapters):
        return [None] * len(dys)
    advice = "page_gradients has no gradient of its own: the layer has first derivatives only."
    x, *dys = no_gradient(advice, (x, *dys))
    of_x, of_dys = shrunk
    return backend.module("page_gradients").page_gradients(x, tuple(dys), adapters, plan, share, (of_x, tuple(of_dys)))

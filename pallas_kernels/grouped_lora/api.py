"""The contract of the grouped LoRA op, and its dispatch."""

from collections.abc import Sequence

from jaxtyping import Array, Float, Int

from pallas_kernels.backend import IMPLEMENTATIONS, Implementation, choose
from pallas_kernels.grouped_lora import hopper_gradients, hopper_shrink, reference, xla
from pallas_kernels.lora_steps.api import Adapters, LoRASteps, Shrunk, make_steps
from pallas_kernels.pages import LoRAPages
from pallas_kernels.plan.api import RoutingPlan

PageGradients = tuple[Float[Array, "_pages 16 in"], Float[Array, "_pages 16 _out"]]

_BACKENDS = {"xla": xla.grouped_lora, "reference": reference.grouped_lora}
_GRADIENTS = {"xla": xla.page_gradients, "reference": reference.page_gradients}


def grouped_lora(
    y: Float[Array, "Q out"],
    x: Float[Array, "M in"],
    pages: LoRAPages,
    plan: RoutingPlan,
    row_index: Int[Array, "Q"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "Q out"]:
    """`y[r] + scale[s, e] * (x[row_index[r]] @ A[s, e].T) @ B[s, e].T` for each sorted row r with expert e and slot s.

    The Hopper kernels have this inside `grouped_matmul`; on its own the op runs through XLA.

    Args:
      y: float32 `[Q, out]`, the base projection in sorted order. x: `[M, in]`.
      row_index: int32 `[Q]`, the row of x that sorted row r reads; None reads row r.
      pages: the projection's adapters; the plan must have been made with its number of slots.

    Returns:
      float32 `[Q, out]`. Rows without an adapter keep the bits of y. A row's bits depend on its own inputs, its own
      adapter and on static shapes alone; an adapter costs the pages it has, whatever the largest rank is.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        choose(implementation)  # raises
    backend = _BACKENDS["reference" if implementation == "reference" else "xla"]
    return backend(y, x, pages, plan, row_index)


def shrink(
    x: Float[Array, "Q in"],
    adapters: Adapters,
    plan: RoutingPlan,
    steps: LoRASteps | None = None,
    implementation: Implementation | None = None,
) -> Shrunk | None:
    """`scale * x[r] @ A.T` of each sorted row's own adapter, for whoever multiplies by B more than once.

    Args:
      adapters: of one projection, or of two that share their input. steps: as `lora_steps` made them.
      implementation: the backend that the plan was made for.

    Returns:
      What `grouped_matmul`, `input_gradient` and `page_gradients` take; None without adapters, and where the backend
      multiplies A and B in one go.
    """
    if implementation != "hopper" or all(pages is None for pages in adapters):
        return None
    if steps is None:
        (steps,) = make_steps(plan, (adapters,))
        assert steps is not None
    return hopper_shrink.shrink_adapters(x, adapters, plan.tiles, steps)


def page_gradients(
    x: Float[Array, "Q in"],
    dys: Sequence[Float[Array, "Q _out"]],
    adapters: Adapters,
    plan: RoutingPlan,
    implementation: Implementation | None = None,
    *,
    share: Float[Array, "Q"] | None = None,
    shrunk: tuple[Shrunk | None, Sequence[Shrunk | None]] = (None, ()),
) -> list[PageGradients | None]:
    """Cotangents of the pages of `y[r] += scale[s, e] * (x[r] @ A[s, e].T) @ B[s, e].T`, for `dy` that of y.

    Args:
      x, dys: rows in sorted order; those of no pair may hold anything, with hopper anything finite (`token_rows`).
      adapters: of one projection, or of two that share x; a dy for each.
      plan: as in `grouped_lora`; the ranks that a matrix's last page is filled up with get zeros. With hopper, experts
        that share a page have none with other pages between them, as in a matrix that all share.
      implementation: the backend that the plan was made for.
      share: float32 `[Q]`, a factor on each row's term, or None for ones.
      shrunk: where they are there already, `shrink` of x by these adapters, and of each dy by the transposed ones (by
        the steps of the former, `LoRASteps.transposed`).

    Returns:
      For each of the adapters the sums of A and of B, None for none: float32, in the shapes of `pages.a` and `pages.b`,
      of each page the sum over the rows and experts that use it (`dA = sum scale * (dy B).T x`,
      `dB = sum scale * (x A.T).T dy`), zeros for a page that no row uses. Sums run in sorted order: the same bits
      every time.

    Raises:
      UnsupportedImplementation: a name that is unknown, or a plan made for another backend.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        choose(implementation)  # raises
    if all(pages is None for pages in adapters):
        return [None] * len(adapters)
    if implementation == "hopper":
        of_x, of_dys = shrunk
        given = None if of_x is None else (of_x, tuple(of_dys))
        return hopper_gradients.page_gradients(x, tuple(dys), adapters, plan, share, given)
    backend = _GRADIENTS["reference" if implementation == "reference" else "xla"]
    return [
        None if pages is None else backend(x, dy, pages, plan, share) for dy, pages in zip(dys, adapters, strict=True)
    ]

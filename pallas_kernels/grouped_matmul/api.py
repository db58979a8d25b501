"""The contract of the grouped matmul, and its dispatch."""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.activations import Activation, gated_unit
from pallas_kernels.backend import Choice, Implementation, UnsupportedImplementation, choose
from pallas_kernels.grouped_lora.api import grouped_lora
from pallas_kernels.grouped_lora.pages import LoRAPages
from pallas_kernels.grouped_matmul import fused, fused_portable, reference, xla
from pallas_kernels.mosaic import ROW_ALIGNMENT
from pallas_kernels.plan import RoutingPlan
from pallas_kernels.steps import Adapters, LoRASteps, make_steps

_MATMUL = {"xla": xla.grouped_matmul, "reference": reference.grouped_matmul}


def grouped_matmul(
    x: Float[Array, "M in"],
    weights: Float[Array, "E _out _in"] | tuple[Float[Array, "E out in"], Float[Array, "E out in"]],
    plan: RoutingPlan,
    *,
    of_tokens: bool = False,
    transposed: bool = False,
    biases: Sequence[Float[Array, "E out"] | None] = (),
    adapters: Adapters = (),
    steps: LoRASteps | None = None,
    activation: Activation = "silu",
    dtype: jax.typing.DTypeLike = jnp.float32,
    implementation: Implementation | None = None,
) -> Float[Array, "Q out"]:
    """`y[r] = lin(W; x[r])` for each sorted row r of the plan, or for a pair of weights the gated product
    `activation(lin(W0; x[r])) * lin(W1; x[r])`; `lin(W; x) = x @ W[e].T + b[e]`, plus the update of the row's adapter.

    Args:
      x: `[Q, in]`, sorted rows; or `[T, in]`, a row a token, with `of_tokens`.
      weights: `[E, out, in]`, one matrix an expert, of x's dtype; or a pair of these.
      plan: made for the same backend (`make_plan(..., implementation)`).
      transposed: `lin(W; x) = x @ W[e]` of one weight `[E, in, out]`, as the gradient of x needs it; its adapters are
        `LoRAPages.transposed()`, its backends hopper, xla and reference.
      biases, adapters: for each weight its own, or None; empty for none at all.
      steps: what `lora_steps` makes of these adapters, where a layer makes those of all its projections at once.
      activation: of the gated product; `clamped_swiglu` takes both factors (see `activations.py`).
      dtype: of the result; sums are kept in float32.
      implementation: a backend by name, or None for the best that is available.

    Returns:
      `[Q, out]`. Rows that the plan skips, or that lie between two experts, hold anything. A row's bits depend on its
      own inputs, its own adapter and on static shapes alone; rows without an adapter have those of `adapters=()`.

    Raises:
      UnsupportedImplementation: see `backend.choose`; or a plan made for another backend.
      ValueError: adapters or biases and weights that do not match in number, a pair of two shapes, or adapters with
        another number of slots than the plan.
    """
    several = weights if isinstance(weights, tuple) else (weights,)
    out_width = several[0].shape[2 if transposed else 1]
    pages = adapters or (None,) * len(several)
    own_biases = biases or (None,) * len(several)
    if {len(pages), len(own_biases)} != {len(several)} or len({weight.shape for weight in several}) != 1:
        raise ValueError(
            f"Got {len(pages)} adapters and {len(own_biases)} biases for weights of shapes "
            f"{[list(weight.shape) for weight in several]}; expected one (or None) a weight, and a pair of one shape."
        )
    if transposed and len(several) == 2:
        raise ValueError("Got a pair of weights to transpose; expected one: a gated product has no transpose.")
    check_slots(plan, pages)
    if plan.position.shape[0] == 0:
        return jnp.zeros((plan.order.shape[0], out_width), dtype)
    picked = choose_for(x, several, pages, dtype, implementation, activation=activation, biases=own_biases).picked
    if picked == "hopper" and implementation is None and plan.alignment % ROW_ALIGNMENT:
        picked = "xla"  # the plan was made for it
    if picked == "portable" and implementation is None and (transposed or not fused_portable.reads(plan)):
        picked = "xla"
    if picked == "hopper":
        return fused.grouped_matmul(x, several, plan, of_tokens, pages, activation, steps, transposed=transposed)
    if picked == "portable":
        if transposed:
            raise UnsupportedImplementation("portable has no transposed form; use implementation='xla' or None.")
        return fused_portable.grouped_matmul(x, several, plan, of_tokens, pages, activation)
    row_index = plan.token if of_tokens else None

    def project(weight: Array, bias: Array | None, own: LoRAPages | None) -> Array:
        y = _MATMUL[picked](x, weight, plan, row_index, bias, transposed)
        return y if own is None else grouped_lora(y, x, own, plan, row_index, picked)

    products = [project(*each) for each in zip(several, own_biases, pages, strict=True)]
    return (products[0] if len(products) == 1 else gated_unit(activation, *products)).astype(dtype)


def weight_gradient(x: Float[Array, "Q in"], dy: Float[Array, "Q out"], plan: RoutingPlan) -> Float[Array, "E out in"]:
    """Float32 cotangent of the weights of `y[r] = x[r] @ W[e].T`, for `dy` that of y: `dW[e] = sum dy[r].T x[r]`.

    Through XLA on every device: a loop over the tiles in use, in sorted order. x, dy: rows in sorted order; rows that
    no tile covers may hold anything.
    """
    return xla.weight_gradient(x, dy, plan)


def lora_steps(
    plan: RoutingPlan, projections: Sequence[Adapters], implementation: Implementation
) -> list[LoRASteps | None]:
    """For each projection what `grouped_matmul` takes as `steps`, made in one go; None where the backend needs none.

    Args:
      projections: the `adapters` of each call. implementation: the backend that the plan was made for.
    """
    return make_steps(plan, projections) if implementation == "hopper" else [None] * len(projections)


def check_slots(plan: RoutingPlan, adapters: Iterable[LoRAPages | None]) -> None:
    """Refuses adapters whose experts and slots are not the plan's: a look-up would be clamped to another's pages."""
    experts, segments = plan.segment_sizes.shape
    for pages in adapters:
        if pages is not None and pages.scale.shape != (segments - 1, experts):
            raise ValueError(
                f"Adapters of {list(pages.scale.shape)} slots and experts came with a plan of "
                f"{[segments - 1, experts]}; give make_plan their numbers."
            )


def choose_for(
    x: Float[Array, "M in"],
    weights: Iterable[Float[Array, "E _out _in"]],
    adapters: Iterable[LoRAPages | None],
    dtype: jax.typing.DTypeLike,
    implementation: Implementation | None = None,
    *,
    activation: Activation = "silu",
    biases: Iterable[Float[Array, "E _out"] | None] = (),
    rounded: bool = False,
) -> Choice:
    """The backend that a `grouped_matmul` of these gets: `backend.choose` with their dtypes, widths and slots.

    Args:
      rounded: float32 pages will be rounded to x's dtype.
    """
    several, given = list(weights), [pages for pages in adapters if pages is not None]
    of_pages = [pages.a.dtype for pages in given if not (rounded and pages.a.dtype == jnp.float32)]
    operands = [*(array.dtype for array in several), *of_pages]
    slots = max((pages.scale.shape[0] for pages in given), default=0)
    widths = several[0].shape[1:]
    return choose(
        implementation,
        dtype=x.dtype,
        operands=operands,
        widths=widths,
        result=dtype,
        slots=slots,
        activation=activation,
        biases=any(bias is not None for bias in biases),
    )

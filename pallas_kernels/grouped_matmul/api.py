"""The contract of the grouped matmul, and its dispatch."""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.activations import Activation, gated_unit
from pallas_kernels.backend import Choice, Implementation, UnsupportedImplementation, choose
from pallas_kernels.grouped_lora.api import grouped_lora
from pallas_kernels.grouped_matmul import hopper, portable, reference, xla
from pallas_kernels.hopper.ring import ROW_ALIGNMENT
from pallas_kernels.lora_steps.api import Adapters, LoRASteps, Shrunk, make_steps
from pallas_kernels.pages import LoRAPages
from pallas_kernels.plan.api import RoutingPlan

_MATMUL = {"xla": xla.grouped_matmul, "reference": reference.grouped_matmul}


def grouped_matmul(
    x: Float[Array, "M in"],
    weights: Float[Array, "E out in"] | tuple[Float[Array, "E out in"], Float[Array, "E out in"]],
    plan: RoutingPlan,
    *,
    of_tokens: bool = False,
    biases: Sequence[Float[Array, "E out"] | None] = (),
    adapters: Adapters = (),
    steps: LoRASteps | Shrunk | None = None,
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
      biases, adapters: for each weight its own, or None; empty for none at all.
      steps: what `lora_steps` makes of these adapters, where a layer makes those of all its projections at once; or
        what `shrink` makes of them and of x.
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
    own_biases, pages = _one_a_weight(several, biases, adapters)
    check_slots(plan, pages)
    if plan.position.shape[0] == 0:
        return jnp.zeros((plan.order.shape[0], several[0].shape[1]), dtype)
    picked = _pick(x, several, plan, pages, dtype, implementation)
    if picked == "hopper":
        return hopper.grouped_matmul(x, several, plan, of_tokens, pages, activation, steps, biases=own_biases)[0]
    if picked == "portable":
        return portable.grouped_matmul(x, several, plan, of_tokens, pages, activation, biases=own_biases)
    row_index = plan.token if of_tokens else None
    products = _products(picked, x, several, plan, own_biases, pages, row_index)
    return (products[0] if len(products) == 1 else gated_unit(activation, *products)).astype(dtype)


def gated_products(
    x: Float[Array, "Q in"],
    weights: tuple[Float[Array, "E out in"], Float[Array, "E out in"]],
    plan: RoutingPlan,
    *,
    biases: Sequence[Float[Array, "E out"] | None] = (),
    adapters: Adapters = (),
    steps: LoRASteps | Shrunk | None = None,
    activation: Activation = "silu",
    implementation: Implementation,
) -> tuple[Float[Array, "Q out"], Float[Array, "Q out"], Float[Array, "Q out"]]:
    """`grouped_matmul` of a pair in x's dtype, and the two factors that it is made of: what a backward pass reads.

    Arguments and errors are those of `grouped_matmul`; `implementation` is the backend that the plan was made for.
    """
    own_biases, pages = _one_a_weight(weights, biases, adapters)
    check_slots(plan, pages)
    if plan.position.shape[0] == 0:
        return (jnp.zeros((plan.order.shape[0], weights[0].shape[1]), x.dtype),) * 3
    picked = _pick(x, weights, plan, pages, x.dtype, implementation)
    if picked == "hopper":
        return hopper.grouped_matmul(  # type: ignore[return-value]
            x, weights, plan, False, pages, activation, steps, biases=own_biases, keep=True
        )
    if picked == "portable":
        gate, up = (
            portable.grouped_matmul(x, (weight,), plan, False, (own,), activation, biases=(bias,))
            for weight, bias, own in zip(weights, own_biases, pages, strict=True)
        )
    else:
        gate, up = _products(picked, x, weights, plan, own_biases, pages, None)
    gated = gated_unit(activation, gate.astype(jnp.float32), up.astype(jnp.float32))
    return gated.astype(x.dtype), gate.astype(x.dtype), up.astype(x.dtype)


def input_gradient(
    dys: Sequence[Float[Array, "Q out"]],
    weights: Sequence[Float[Array, "E out in"]],
    plan: RoutingPlan,
    *,
    adapters: Adapters = (),
    shrunk: Sequence[Shrunk | None] = (),
    implementation: Implementation | None = None,
) -> Float[Array, "Q in"]:
    """Cotangent of the sorted rows that one projection read, or that two did: the sum over both.

    `dx[r] = sum dy[r] @ W[e] + scale[s, e] * (dy[r] @ B[s, e]) @ A[s, e]`, in dy's dtype, summed in float32.

    Args:
      dys, weights, adapters: of each projection; adapters as the forward pass has them, or none at all.
      shrunk: what `shrink` made of each dy by `LoRAPages.transposed()`, where it is there already.
      implementation: as in `grouped_matmul`; portable has no such kernel.

    Returns:
      `[Q, in]`; rows that the plan skips, or that lie between two experts, hold anything.

    Raises:
      UnsupportedImplementation, ValueError: as `grouped_matmul`.
    """
    several = tuple(weights)
    if len(dys) != len(several):
        raise ValueError(f"Got {len(dys)} cotangents for {len(several)} weights; expected one a weight.")
    _, pages = _one_a_weight(several, (), adapters)
    check_slots(plan, pages)
    dtype = dys[0].dtype
    if plan.position.shape[0] == 0:
        return jnp.zeros((plan.order.shape[0], several[0].shape[2]), dtype)
    picked = _pick(dys[0], several, plan, pages, dtype, implementation)
    if picked == "hopper":
        return hopper.input_gradient(tuple(dys), several, plan, pages, tuple(shrunk) or (None,) * len(several))
    if picked == "portable":
        if implementation is not None:
            raise UnsupportedImplementation("portable has no transposed form; use implementation='xla' or None.")
        picked = "xla"
    total: Array | None = None
    for dy, weight, own in zip(dys, several, pages, strict=True):
        product = _MATMUL[picked](dy, weight, plan, None, None, True)
        total = product if total is None else total + product
        if own is not None:
            total = grouped_lora(total, dy, own.transposed(), plan, None, picked)
    assert total is not None
    return total.astype(dtype)


def _one_a_weight(
    weights: Sequence[Array], biases: Sequence[Array | None], adapters: Adapters
) -> tuple[tuple[Array | None, ...], Adapters]:
    """Biases and adapters, None for each weight where there are none."""
    none = (None,) * len(weights)
    own_biases, pages = tuple(biases) or none, tuple(adapters) or none
    if {len(pages), len(own_biases)} != {len(weights)} or len({weight.shape for weight in weights}) != 1:
        raise ValueError(
            f"Got {len(pages)} adapters and {len(own_biases)} biases for weights of shapes "
            f"{[list(weight.shape) for weight in weights]}; expected one (or None) a weight, and a pair of one shape."
        )
    return own_biases, pages


def _pick(
    x: Array,
    weights: Sequence[Array],
    plan: RoutingPlan,
    pages: Adapters,
    dtype: jax.typing.DTypeLike,
    implementation: Implementation | None,
) -> Implementation:
    """The backend; where none was asked for, one that can read the plan."""
    picked = choose_for(x, weights, pages, dtype, implementation).picked
    if implementation is None:
        if picked == "hopper" and plan.alignment % ROW_ALIGNMENT:
            return "xla"
        if picked == "portable" and not portable.reads(plan):
            return "xla"
    return picked


def _products(
    picked: Implementation,
    x: Array,
    weights: Sequence[Array],
    plan: RoutingPlan,
    biases: Sequence[Array | None],
    adapters: Adapters,
    row_index: Array | None,
) -> list[Array]:
    """Each projection's rows in float32, through XLA or by the definition."""

    def project(weight: Array, bias: Array | None, own: LoRAPages | None) -> Array:
        y = _MATMUL[picked](x, weight, plan, row_index, bias, False)
        return y if own is None else grouped_lora(y, x, own, plan, row_index, picked)

    return [project(*each) for each in zip(weights, biases, adapters, strict=True)]


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
    )

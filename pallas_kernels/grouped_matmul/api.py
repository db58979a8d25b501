"""The contract of the grouped matmul and of its backward forms, and which backend runs them."""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.activations import Activation
from pallas_kernels.backend import Backend, Choice, Implementation, Op, Operand, backend_for_plan, choose
from pallas_kernels.errors import InputError, UnsupportedImplementation
from pallas_kernels.gradients import no_gradient
from pallas_kernels.grouped_matmul import xla
from pallas_kernels.grouped_matmul.biases import Biases
from pallas_kernels.lora_steps.api import LoRASteps, Shrunk
from pallas_kernels.pages import LayerPages, Place
from pallas_kernels.plan.api import RoutingPlan
from pallas_kernels.quantised.array import Quantised, Weights

ADVICE = (
    "{} has no gradient of its own: differentiate routed_experts, the whole layer, "
    "or call input_gradient, weight_gradient and page_gradients."
)
ExpertMatrices = Float[Array, "E _out _in"] | Quantised
FIRST_ORDER = "{} has no gradient of its own: the layer has first derivatives only."


def grouped_matmul(
    x: Float[Array, "M in"],
    weights: ExpertMatrices | tuple[ExpertMatrices, ExpertMatrices],
    plan: RoutingPlan,
    *,
    of_tokens: bool = False,
    biases: Sequence[Float[Array, "E out"] | None] = (),
    adapters: LayerPages | None = None,
    steps: LoRASteps | Shrunk | None = None,
    activation: Activation = "silu",
    dtype: jax.typing.DTypeLike = jnp.float32,
    implementation: Implementation | None = None,
) -> Float[Array, "Q out"]:
    """`y[r] = lin(W; x[r])` for each sorted row r of the plan, or for a pair of weights the gated product.

    `lin(W; x) = x @ W[e].T + b[e]`, plus the update of the row's adapter; the gated product is
    `activation(lin(W0; x[r])) * lin(W1; x[r])`.

    Args:
      x: `[Q, in]`, sorted rows; or `[T, in]`, one row per token, with `of_tokens`.
      weights: `[E, out, in]`, one matrix per expert, of x's dtype or quantised; or a pair of these.
      plan: as `make_plan` made it for the backend.
      of_tokens: x has one row per token.
      biases: for each weight its bias, or None; empty for none at all.
      adapters: for each weight, in this order, its module's pages (`LayerPages.select`); None for none at all.
      steps: what `make_lora_steps` makes of these adapters, where a layer makes those of all its projections at once;
        or what `shrink` makes of them and of x.
      activation: of the gated product; `clamped_swiglu` takes both factors (see `activations.py`).
      dtype: of the result; sums are kept in float32.
      implementation: a backend by name, or None for the plan's.

    Returns:
      `[Q, out]`. Rows that the plan skips, or that lie between two experts, are undefined. A row's bits depend on its
      own inputs, its own adapter and on static shapes alone; rows without an adapter have those of `adapters=None`.

    Raises:
      UnsupportedImplementation: the backend is unknown, cannot run the call, or cannot read the plan.
      InputError: adapters or biases and weights that do not match in number, a pair of two shapes, or adapters with
        another number of slots than the plan.
      NotDifferentiable: when it is differentiated; see `routed_experts`.
    """
    several = weights if isinstance(weights, tuple) else (weights,)
    backend = _backend("grouped_matmul", x, several, adapters, plan, dtype, implementation)
    biases, adapters = _one_per_weight(several, biases, adapters)
    x, several, biases, adapters = no_gradient(ADVICE.format("grouped_matmul"), (x, several, biases, adapters))
    if plan.position.shape[0] == 0:
        return jnp.zeros((plan.order.shape[0], several[0].shape[1]), dtype)
    y = backend.module("grouped_matmul").grouped_matmul(
        x, several, plan, of_tokens=of_tokens, biases=biases, adapters=adapters, steps=steps, activation=activation
    )
    return y.astype(dtype)


def gated_products(
    x: Float[Array, "Q in"],
    weights: tuple[ExpertMatrices, ExpertMatrices],
    plan: RoutingPlan,
    *,
    biases: Sequence[Float[Array, "E out"] | None] = (),
    adapters: LayerPages | None = None,
    steps: LoRASteps | Shrunk | None = None,
    activation: Activation = "silu",
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "Q out"], Float[Array, "Q out"], Float[Array, "Q out"]]:
    """`grouped_matmul` of a pair in x's dtype, and the two factors that it is made of: what a backward pass reads.

    Arguments and errors are those of `grouped_matmul`.

    Returns:
      Three times `[Q, out]`: the gated product, gate's product and up's.
    """
    backend = _backend("grouped_matmul", x, weights, adapters, plan, x.dtype, implementation)
    biases, adapters = _one_per_weight(weights, biases, adapters)
    x, weights, biases, adapters = no_gradient(ADVICE.format("gated_products"), (x, weights, biases, adapters))
    if plan.position.shape[0] == 0:
        return (jnp.zeros((plan.order.shape[0], weights[0].shape[1]), x.dtype),) * 3
    return backend.module("grouped_matmul").gated_products(
        x, weights, plan, biases=biases, adapters=adapters, steps=steps, activation=activation
    )


def input_gradient(
    dys: Sequence[Float[Array, "Q out"]],
    weights: Sequence[ExpertMatrices],
    plan: RoutingPlan,
    *,
    adapters: LayerPages | None = None,
    shrunk: Sequence[Shrunk | None] = (),
    implementation: Implementation | None = None,
) -> Float[Array, "Q in"]:
    """Cotangent of the sorted rows that one projection read, or that two did: the sum over both.

    `dx[r] = sum dy[r] @ W[e] + scale[s, e] * (dy[r] @ B[s, e]) @ A[s, e]`, in dy's dtype, summed in float32.

    Args:
      dys: cotangents, one for each projection.
      weights: of each projection.
      plan: as `make_plan` made it. Portable has no such kernel: on its plans the op runs through XLA.
      adapters: as the forward pass has them.
      shrunk: what `shrink` made of each dy by `LayerPages.transposed()`, where it is there already.
      implementation: a backend by name, or None for the plan's.

    Returns:
      `[Q, in]`; rows that the plan skips, or that lie between two experts, are undefined.

    Raises:
      UnsupportedImplementation: as `grouped_matmul`.
      InputError: as `grouped_matmul`.
      NotDifferentiable: when it is differentiated: there are no second derivatives.
    """
    several, dys = tuple(weights), tuple(dys)
    if len(dys) != len(several):
        raise InputError(f"Got {len(dys)} cotangents for {len(several)} weights; expected one for each weight.")
    backend = _backend("input_gradient", dys[0], several, adapters, plan, dys[0].dtype, implementation)
    _, adapters = _one_per_weight(several, (), adapters)
    dys, several, adapters = no_gradient(FIRST_ORDER.format("input_gradient"), (dys, several, adapters))
    if plan.position.shape[0] == 0:
        return jnp.zeros((plan.order.shape[0], several[0].shape[2]), dys[0].dtype)
    shrunk = tuple(shrunk) or (None,) * len(several)
    return backend.module("input_gradient").input_gradient(dys, several, plan, adapters=adapters, shrunk=shrunk)


def weight_gradient(x: Float[Array, "Q in"], dy: Float[Array, "Q out"], plan: RoutingPlan) -> Float[Array, "E out in"]:
    """Float32 cotangent of the weights of `y[r] = x[r] @ W[e].T`, for `dy` that of y: `dW[e] = sum dy[r].T x[r]`.

    Through XLA on every device: a loop over the tiles in use, in sorted order.

    Args:
      x: rows in sorted order; rows that no tile covers may be undefined.
      dy: cotangents in sorted order, likewise.
      plan: as `make_plan` made it.

    Raises:
      NotDifferentiable: when it is differentiated: there are no second derivatives.
    """
    x, dy = no_gradient(FIRST_ORDER.format("weight_gradient"), (x, dy))
    return xla.weight_gradient(x, dy, plan)


def _backend(
    op: Op,
    x: Array,
    weights: Sequence[Weights],
    adapters: LayerPages | None,
    plan: RoutingPlan,
    dtype: jax.typing.DTypeLike,
    implementation: Implementation | None,
) -> Backend:
    """The plan's backend or the one that was asked for, which can run the call."""
    backend = backend_for_plan(plan.backend, implementation, None if implementation is None else op)
    if implementation is None:
        backend = backend.for_op(op)
    try:
        choose_for(x, weights, adapters, dtype, backend.name)
    except UnsupportedImplementation as error:
        if implementation is not None:
            raise
        raise UnsupportedImplementation(
            f"The plan was made for {plan.backend!r}. {error} Give make_plan the dtype and the widths of the rows."
        ) from error
    _check_slots(plan, adapters)
    return backend


def _one_per_weight(
    weights: Sequence[Weights], biases: Sequence[Array | None], adapters: LayerPages | None
) -> tuple[Biases, LayerPages]:
    """Biases and adapters with a place for each weight."""
    every = tuple(biases) or (None,) * len(weights)
    places = adapters.places if adapters is not None else tuple(Place(str(nth)) for nth in range(len(weights)))
    if {len(places), len(every)} != {len(weights)} or len({weight.shape for weight in weights}) != 1:
        raise InputError(
            f"Got adapters of {len(places)} modules and {len(every)} biases for weights of shapes "
            f"{[list(weight.shape) for weight in weights]}; expected one for each weight, and a pair of one shape "
            "(LayerPages.select gives the modules of a call)."
        )
    return every, LayerPages({}, {}, {}, places, 0) if adapters is None else adapters


def _check_slots(plan: RoutingPlan, adapters: LayerPages | None) -> None:
    """Refuses adapters whose experts and slots are not the plan's: a look-up would be clamped to another's pages."""
    experts, segments = plan.segment_sizes.shape
    for module, scale in ({} if adapters is None else adapters.scales).items():
        if scale.shape != (segments - 1, experts):
            raise InputError(
                f"Adapters of {module!r} have {list(scale.shape)} slots and experts and came with a plan of "
                f"{[segments - 1, experts]}; give make_plan their numbers."
            )


def choose_for(
    x: Float[Array, "M in"],
    weights: Iterable[ExpertMatrices],
    adapters: LayerPages | None,
    dtype: jax.typing.DTypeLike,
    implementation: Implementation | None = None,
    *,
    rounded: bool = False,
) -> Choice[Implementation]:
    """The backend that a `grouped_matmul` of these gets: `backend.choose` with their dtypes, widths and slots.

    Args:
      x: the rows.
      weights: of all projections.
      adapters: of all projections, or None.
      dtype: of the result.
      implementation: a backend by name, or None for the best.
      rounded: float32 pages will be rounded to x's dtype.

    Raises:
      UnsupportedImplementation: as `choose`.
    """
    several = list(weights)
    return choose(
        implementation,
        dtype=x.dtype,
        operands=operands_of(x, several, adapters, rounded),
        widths=several[0].shape[1:],
        result=dtype,
        slots=0 if adapters is None else adapters.num_slots,
    )


def operands_of(
    x: Array, weights: Iterable[Weights], adapters: LayerPages | None, rounded: bool = False
) -> list[Operand]:
    """Dtypes of the weights and of the pages, formats of quantised weights; arguments as in `choose_for`."""
    pools = () if adapters is None else adapters.pools.values()
    of_pages = [pool.dtype for pool in pools if not (rounded and pool.dtype == jnp.float32)]
    return [*(w.format if isinstance(w, Quantised) else w.dtype for w in weights), *of_pages]

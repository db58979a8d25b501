"""The routed experts as one differentiable function: gate and up, the gated unit, down, and the weighted sum.

The gradient is written by hand around whatever backend runs the layer. No weight's update is ever made dense, and
nothing costs E times the work: with `z[r] = dy[token of r] @ lin(down)` (unweighted) and p the router's weights,

    d weights[t, k] = <z[r], a[r]>        d a[r] = p[r] z[r]        d gate, d up = the unit's own, elementwise
    d x[t] = sum over its rows of lin(gate)^T d gate + lin(up)^T d up

so down's rows are not kept. What is kept: x, the plan, gate's and up's products (2 P F) and what the adapters' shrinks
made of the rows, which cost less to keep than to multiply again; `remat` multiplies them again.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Float

from pallas_kernels.activations import Activation, gated_unit
from pallas_kernels.dispatch.api import combine, routed, token_rows
from pallas_kernels.errors import NotDifferentiable
from pallas_kernels.grouped_lora.api import page_gradients
from pallas_kernels.grouped_matmul.api import grouped_matmul, weight_gradient
from pallas_kernels.lora_steps.api import Shrunk, forward_plan_and_steps
from pallas_kernels.pages import NO_ADAPTERS, LayerPages
from pallas_kernels.plan.api import RoutingPlan, row_experts
from pallas_kernels.quantised.array import Quantised, Weights
from pallas_kernels.routed_experts.projections import (
    IN,
    OUT,
    LayerCall,
    Products,
    Rows,
    down_projection,
    gate_and_up,
    rows_gradient,
    shrink_cotangent,
)
from pallas_kernels.routed_experts.weights import ExpertWeights
from pallas_kernels.varying import varying_as


def routed_experts(
    x: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    experts: ExpertWeights,
    adapters: LayerPages | None,
    plan: RoutingPlan,
    activation: Activation = "silu",
    remat: bool = False,
) -> Float[Array, "T D"]:
    """Each token through its experts with its own adapter, weighted and summed: a layer after its router.

    Differentiable with respect to x, the router's weights, the experts and the adapters' pages. Gradients that nobody
    asks for are not computed. An adapter's scale is a constant, and so are quantised experts.

    Args:
      x: `[T, D]`, one row per token.
      weights: float32 `[T, K]`, router weights.
      experts: all experts' weights.
      adapters: the layer's pages of gate, up and down; None for none.
      plan: as `make_plan` made it of the experts and slots of the tokens; its backend runs the layer.
      activation: of the gated unit.
      remat: for gradients: multiply gate and up again in the backward pass, in place of keeping both products.

    Returns:
      `[T, D]` in x's dtype.

    Raises:
      UnsupportedImplementation: the plan's backend cannot run the call.
      InputError: adapters with another number of slots or experts than the plan.
    """
    pages = NO_ADAPTERS if adapters is None else adapters.select(*(m for m in (*IN, *OUT) if m in adapters))
    pages = replace(pages, scales=jax.lax.stop_gradient(pages.scales))
    leaves, structure = jax.tree.flatten(plan)
    return _layer(LayerCall(activation, remat, structure), *varying_as((x, weights, experts, pages, leaves)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _layer(call: LayerCall, x, weights, experts, pages, leaves) -> Float[Array, "T D"]:
    plan, adapters = jax.tree.unflatten(call.plan, leaves), pages.astype(x.dtype)
    plan, (steps_in, steps_out) = forward_plan_and_steps(plan, (adapters.select(*IN), adapters.select(*OUT)))
    gated = grouped_matmul(
        x,
        (experts.gate, experts.up),
        plan,
        of_tokens=True,
        biases=(experts.gate_bias, experts.up_bias),
        adapters=adapters.select(*IN),
        steps=steps_in,
        activation=call.activation,
        dtype=x.dtype,
    )
    return combine(down_projection(gated, experts, adapters, plan, steps_out), weights, plan).astype(x.dtype)


@jax.tree_util.register_static
@dataclass(frozen=True)
class _WantedGradients:
    """Which gradients are asked for: of x, of each expert array, of each pool (the router's weights come for free)."""

    x: bool
    experts: frozenset[str]
    pools: frozenset[str]


def _forward(call: LayerCall, *traced: Any) -> tuple[Array, tuple[Any, ...]]:
    x, weights, experts, pages, leaves = values = jax.tree.map(lambda leaf: leaf.value, traced, is_leaf=_is_primal)
    asked_x, _, asked_experts, asked_pages, _ = traced
    wanted = _WantedGradients(
        asked_x.perturbed,
        _perturbed(asked_experts),
        frozenset(name for name, leaf in asked_pages.pools.items() if leaf.perturbed),
    )
    products = None
    if call.remat:
        y = _layer(call, *values)
    else:
        plan, adapters = jax.tree.unflatten(call.plan, leaves), pages.astype(x.dtype)
        rows = token_rows(x, plan, clear=False)
        gated, products = gate_and_up(call, rows, experts, adapters, plan)
        down = down_projection(gated, experts, adapters, plan, products.shrunk_out)
        y = combine(down, weights, plan).astype(x.dtype)
    return y, (values, products, wanted)


def _perturbed(experts: ExpertWeights) -> frozenset[str]:
    """The arrays that are differentiated."""
    arrays = {name: leaf for name, leaf in vars(experts).items() if leaf is not None}
    frozen = [leaf for leaf in arrays.values() if isinstance(leaf, Quantised)]
    if any(leaf.perturbed for leaf in jax.tree.leaves(frozen, is_leaf=_is_primal)):
        raise NotDifferentiable("Quantised experts have no gradient: differentiate by adapters, or dequantise them.")
    return frozenset(name for name, leaf in arrays.items() if not isinstance(leaf, Quantised) and leaf.perturbed)


def _is_primal(leaf: Any) -> bool:
    """Whether it is jax's own wrapper, which says of an argument whether it is differentiated."""
    return isinstance(leaf, CustomVJPPrimal)


def _backward(call: LayerCall, kept: tuple[Any, ...], dy: Any) -> tuple[Any, ...]:
    (x, weights, experts, pages, leaves), products, wanted = kept
    plan, adapters = jax.tree.unflatten(call.plan, leaves), pages.astype(x.dtype)
    dtype, pairs = x.dtype, plan.position.shape[0]
    if isinstance(dy, SymbolicZero):  # another output of what is differentiated is the only one that counts
        dy = jnp.zeros(dy.shape, dy.dtype)
    rows_x = token_rows(x, plan)
    rows_dy = token_rows(dy, plan)
    if products is None:
        _, products = gate_and_up(call, rows_x, experts, adapters, plan)
    # The barrier keeps XLA from keeping float32 values that both passes compute from these.
    gate, up = jax.lax.optimization_barrier((products.gate, products.up))
    owned = (row_experts(plan) < plan.group_sizes.shape[0])[:, None]  # the other rows are undefined
    share = jnp.append(weights.reshape(pairs), 0.0)[plan.order]  # the router's, of each sorted row

    shrunk = {"down": shrink_cotangent(rows_dy, "down", adapters, plan, products)}
    z = rows_gradient({"down": rows_dy}, experts, adapters, plan, shrunk).astype(jnp.float32)
    wide = gate.astype(jnp.float32), up.astype(jnp.float32)
    gated, pull = jax.vjp(partial(gated_unit, call.activation), *wide)
    clean = lambda d: jnp.where(owned, d, 0.0).astype(dtype)  # noqa: E731
    dgate, dup = map(clean, pull(share[:, None] * z))
    rows_gated = clean(gated)

    dweights = (z * gated).sum(-1)[plan.position]
    if experts.down_bias is not None:
        owner = row_experts(plan)[plan.position]
        bias = experts.down_bias[jnp.minimum(owner, experts.down_bias.shape[0] - 1)]
        dweights = dweights + (rows_dy[plan.position].astype(jnp.float32) * bias.astype(jnp.float32)).sum(-1)
    dweights = jnp.where(routed(plan), dweights, 0.0).reshape(weights.shape).astype(weights.dtype)

    cotangents = {"gate": dgate, "up": dup}
    shrunk |= {name: shrink_cotangent(d, name, adapters, plan, products) for name, d in cotangents.items()}
    dx = jnp.zeros_like(x)
    if wanted.x:
        rows = rows_gradient(cotangents, experts, adapters, plan, shrunk)
        dx = combine(rows, jnp.ones(weights.shape, jnp.float32), plan).astype(dtype)

    ends = {"gate": (rows_x, dgate, None), "up": (rows_x, dup, None), "down": (rows_gated, rows_dy, share)}
    dexperts = _expert_gradients(wanted.experts, experts, ends, plan)
    sums = _page_gradients(wanted.pools, adapters, ends, plan, products, shrunk)
    dpools = _pool_gradients(pages, sums)
    # Together, so that a layer's rows are given up before the next layer's are made.
    dx, dpools = jax.lax.optimization_barrier((dx, dpools))
    dpages = replace(pages, pools=dpools, tables=None, scales=None)
    return dx, dweights, dexperts, dpages, [None] * len(leaves)


Ends = dict[str, tuple[Rows, Rows, Array | None]]  # of each projection its rows, their cotangents, and a share of each


def _expert_gradients(wanted: frozenset[str], experts: ExpertWeights, ends: Ends, plan: RoutingPlan) -> ExpertWeights:
    """Of the arrays that are asked for, zeros for the others, None for quantised ones."""

    def gradient(name: str, value: Weights | None) -> Array | None:
        if value is None or isinstance(value, Quantised):
            return None
        if name not in wanted:
            return jnp.zeros_like(value)
        rows, dy, share = ends[name.removesuffix("_bias")]
        if name.endswith("_bias"):
            rows = jnp.ones((dy.shape[0], 1), dy.dtype)
        if share is not None:
            rows = share[:, None] * rows.astype(jnp.float32)
            dy = dy.astype(jnp.float32)
        total = weight_gradient(rows, dy, plan).astype(value.dtype)
        return total[:, :, 0] if name.endswith("_bias") else total

    return ExpertWeights(**{name: gradient(name, value) for name, value in vars(experts).items()})  # type: ignore[arg-type]


def _page_gradients(
    wanted: frozenset[str],
    adapters: LayerPages,
    ends: Ends,
    plan: RoutingPlan,
    products: Products,
    shrunk: dict[str, Shrunk | None],
) -> dict[str, tuple[Array, Array]]:
    """Of each module that has pages in a pool that is asked for."""
    asked = {place.module for place in adapters.places if not wanted.isdisjoint((place.a, place.b))}
    sums: dict[str, tuple[Array, Array]] = {}
    for modules, of_rows in ((IN, products.shrunk_in), (OUT, products.shrunk_out)):
        rows, _, share = ends[modules[0]]
        gradients = page_gradients(
            rows,
            [ends[module][1] for module in modules],
            adapters.only(asked).select(*modules),
            plan,
            share=share,
            shrunk=(of_rows, [shrunk[module] for module in modules]),
        )
        sums |= {module: pair for module, pair in zip(modules, gradients, strict=True) if pair is not None}
    return sums


def _pool_gradients(pages: LayerPages, sums: dict[str, tuple[Array, Array]]) -> dict[str, Array]:
    """Of each pool the sum over the modules whose pages it holds."""
    totals: dict[str, Array] = {}
    for place in pages.places:
        for name, gradient in zip((place.a, place.b), sums.get(place.module, ()), strict=False):
            totals[name] = totals[name] + gradient if name in totals else gradient
    return {
        name: totals[name].astype(pool.dtype) if name in totals else jnp.zeros_like(pool)
        for name, pool in pages.pools.items()
    }


_layer.defvjp(_forward, _backward, symbolic_zeros=True)

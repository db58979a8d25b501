"""The routed experts as one differentiable function: gate and up, the gated unit, down, and the weighted sum.

The gradient is written by hand around whatever backend runs the layer. No weight's update is ever made dense, and
nothing costs E times the work: with `z[r] = dy[token of r] @ lin(down)` (unweighted) and p the router's weights,

    d weights[t, k] = <z[r], a[r]>        d a[r] = p[r] z[r]        d gate, d up = the unit's own, elementwise
    d x[t] = sum over its rows of lin(gate)^T d gate + lin(up)^T d up

so down's rows are not kept. What is kept: x, the plan, and gate's and up's products (2 P F), which cost less to keep
than to multiply again; `remat` multiplies them again.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Float

from jax_moe_lora.expert_projections import (
    IN,
    OUT,
    Call,
    Rows,
    Tables,
    adapters_of,
    backward_implementation,
    combine,
    products_of,
    routed,
    those_of,
    transposed,
    unit,
)
from jax_moe_lora.types import ExpertWeights
from pallas_kernels import (
    Activation,
    Implementation,
    LoRAPages,
    RoutingPlan,
    grouped_matmul,
    lora_steps,
    page_gradients,
    token_rows,
    weight_gradient,
)
from pallas_kernels.activations import gated_unit
from pallas_kernels.plan import row_experts


def run(
    x: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    experts: ExpertWeights,
    adapters: dict[str, LoRAPages],
    plan: RoutingPlan,
    activation: Activation,
    implementation: Implementation,
    remat: bool = False,
) -> Float[Array, "T D"]:
    """The layer after its plan; see `moe.routed_experts`.

    Differentiable with respect to x, the router's weights, the experts and the adapters' pages. Gradients that nobody
    asks for are not computed. An adapter's scale is a constant.
    """
    pools: list[Array] = []  # each array once, so that kernels see which modules share one

    def place(pool: Array) -> int:
        found = next((index for index, other in enumerate(pools) if other is pool), len(pools))
        if found == len(pools):
            pools.append(pool)
        return found

    places = tuple((name, place(pages.a), place(pages.b)) for name, pages in adapters.items())
    max_rank = max((pages.max_rank for pages in adapters.values()), default=0)
    tables = {name: Tables(pages.table, jax.lax.stop_gradient(pages.scale)) for name, pages in adapters.items()}
    leaves, indices = jax.tree.flatten((tables, plan))
    call = Call(activation, implementation, remat, places, max_rank, indices)
    return _layer(call, x, weights, vars(experts), pools, leaves)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _layer(call: Call, x, weights, arrays, pools, leaves) -> Float[Array, "T D"]:
    """Plain containers of arrays, because jax puts its own wrappers into them to say which are differentiated."""
    experts = ExpertWeights(**arrays)
    tables, plan = jax.tree.unflatten(call.indices, leaves)
    adapters = adapters_of(call, x.dtype, pools, tables)
    steps_in, steps_out = lora_steps(plan, (those_of(adapters, IN), those_of(adapters, OUT)), call.implementation)
    gated = grouped_matmul(
        x,
        (experts.gate, experts.up),
        plan,
        of_tokens=True,
        biases=(experts.gate_bias, experts.up_bias),
        adapters=those_of(adapters, IN),
        steps=steps_in,
        activation=call.activation,
        dtype=x.dtype,
        implementation=call.implementation,
    )
    return _finish(call, gated, weights, experts, adapters, plan, steps_out)


def _finish(call: Call, gated: Rows, weights, experts, adapters, plan, steps=None) -> Float[Array, "T D"]:
    """From the gated product to y."""
    down = grouped_matmul(
        gated,
        experts.down,
        plan,
        biases=(experts.down_bias,),
        adapters=those_of(adapters, OUT),
        steps=steps,
        dtype=gated.dtype,
        implementation=call.implementation,
    )
    return combine(down, weights, plan).astype(gated.dtype)


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Wanted:
    """Which gradients are asked for: of x, of each expert array, of each pool (the router's weights come for free)."""

    x: bool
    experts: frozenset[str]
    pools: frozenset[int]


def _forward(call: Call, *traced: Any) -> tuple[Array, tuple[Any, ...]]:
    is_primal = lambda leaf: isinstance(leaf, CustomVJPPrimal)  # noqa: E731
    x, weights, arrays, pools, leaves = values = jax.tree.map(lambda leaf: leaf.value, traced, is_leaf=is_primal)
    asked_x, _, asked_arrays, asked_pools, _ = traced
    wanted = _Wanted(
        asked_x.perturbed,
        frozenset(name for name, leaf in asked_arrays.items() if leaf is not None and leaf.perturbed),
        frozenset(index for index, leaf in enumerate(asked_pools) if leaf.perturbed),
    )
    products = None
    if call.remat:
        y = _layer(call, *values)
    else:
        experts = ExpertWeights(**arrays)
        tables, plan = jax.tree.unflatten(call.indices, leaves)
        adapters = adapters_of(call, x.dtype, pools, tables)
        products = products_of(call, token_rows(x, plan, call.implementation), experts, adapters, plan)
        y = _finish(call, unit(call, *products), weights, experts, adapters, plan)
    return y, (values, products, wanted)


def _backward(call: Call, kept: tuple[Any, ...], dy: Any) -> tuple[Any, ...]:
    (x, weights, arrays, pools, leaves), products, wanted = kept
    experts = ExpertWeights(**arrays)
    tables, plan = jax.tree.unflatten(call.indices, leaves)
    adapters = adapters_of(call, x.dtype, pools, tables)
    dtype, pairs = x.dtype, plan.position.shape[0]
    if isinstance(dy, SymbolicZero):  # another output of what is differentiated is the only one that counts
        dy = jnp.zeros(dy.shape, dy.dtype)
    rows_x = token_rows(x, plan, call.implementation)
    rows_dy = token_rows(dy, plan, call.implementation)
    gate, up = products or products_of(call, rows_x, experts, adapters, plan)
    owned = (row_experts(plan) < plan.group_sizes.shape[0])[:, None]  # the other rows hold anything
    share = jnp.append(weights.reshape(pairs), 0.0)[plan.order][:, None]  # the router's, of each sorted row

    z = transposed(call, rows_dy, "down", experts, adapters, plan).astype(jnp.float32)
    wide = gate.astype(jnp.float32), up.astype(jnp.float32)
    gated, pull = jax.vjp(partial(gated_unit, call.activation), *wide)
    clean = lambda d: jnp.where(owned, d, 0.0).astype(dtype)  # noqa: E731
    dgate, dup = map(clean, pull(share * z))
    by_share = clean(share * gated)

    dweights = (z * gated).sum(-1)[plan.position]
    if experts.down_bias is not None:
        owner = row_experts(plan)[plan.position]
        bias = experts.down_bias[jnp.minimum(owner, experts.down_bias.shape[0] - 1)]
        dweights = dweights + (rows_dy[plan.position].astype(jnp.float32) * bias.astype(jnp.float32)).sum(-1)
    dweights = jnp.where(routed(plan), dweights, 0.0).reshape(weights.shape).astype(weights.dtype)

    dx = jnp.zeros_like(x)
    if wanted.x:
        ones = jnp.ones(weights.shape, jnp.float32)
        parts = (("gate", dgate), ("up", dup))
        rows = [transposed(call, d, name, experts, adapters, plan).astype(jnp.float32) for name, d in parts]
        dx = combine(rows[0] + rows[1], ones, plan).astype(dtype)

    ends = {"gate": (rows_x, dgate), "up": (rows_x, dup), "down": (by_share, rows_dy)}
    dexperts = _expert_gradients(wanted.experts, experts, ends, share, plan)
    dpools = _pool_gradients(call, wanted.pools, pools, adapters, ends, plan)
    return dx, dweights, dexperts, dpools, [None] * len(leaves)


def _expert_gradients(
    wanted: frozenset[str], experts: ExpertWeights, ends: dict[str, tuple[Rows, Rows]], share: Array, plan: RoutingPlan
) -> dict[str, Array | None]:
    """Of the arrays that are asked for, zeros for the others."""

    def gradient(name: str, value: Array | None) -> Array | None:
        if value is None or name not in wanted:
            return None if value is None else jnp.zeros_like(value)
        rows, dy = ends[name.removesuffix("_bias")]
        if not name.endswith("_bias"):
            return weight_gradient(rows, dy, plan).astype(value.dtype)
        ones = jnp.ones((dy.shape[0], 1), jnp.float32)
        shared = share if name == "down_bias" else ones
        return weight_gradient(ones, shared * dy.astype(jnp.float32), plan)[:, :, 0].astype(value.dtype)

    return {name: gradient(name, value) for name, value in vars(experts).items()}


def _pool_gradients(
    call: Call, wanted: frozenset[int], pools, adapters, ends: dict[str, tuple[Rows, Rows]], plan: RoutingPlan
) -> list[Array]:
    """Of each pool the sum over the modules whose pages it holds."""
    totals: list[Array | None] = [None] * len(pools)
    for name, *places in call.pools:
        if wanted.isdisjoint(places):
            continue
        gradients = page_gradients(*ends[name], adapters[name], plan, backward_implementation(call))
        for index, own in zip(places, gradients, strict=True):
            before = totals[index]
            totals[index] = own if before is None else before + own
    return [
        jnp.zeros_like(pool) if total is None else total.astype(pool.dtype)
        for pool, total in zip(pools, totals, strict=True)
    ]


_layer.defvjp(_forward, _backward, symbolic_zeros=True)

"""The routed experts as one differentiable function: gate and up, the gated unit, down, and the weighted sum.

The gradient is written by hand around whatever backend runs the layer. No weight's update is ever made dense, and
nothing costs E times the work: with `z[r] = dy[token of r] @ lin(down)` (unweighted) and p the router's weights,

    d weights[t, k] = <z[r], a[r]>        d a[r] = p[r] z[r]        d gate, d up = the unit's own, elementwise
    d x[t] = sum over its rows of lin(gate)^T d gate + lin(up)^T d up

so down's rows are not kept. What is kept: x, the plan, gate's and up's products (2 P F) and what the adapters' shrinks
made of the rows, which cost less to keep than to multiply again; `remat` multiplies them again.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Float

from pallas_kernels.activations import Activation, gated_unit
from pallas_kernels.backend import Implementation
from pallas_kernels.dispatch.api import token_rows
from pallas_kernels.grouped_lora.api import page_gradients
from pallas_kernels.grouped_matmul.api import grouped_matmul, lora_steps, weight_gradient
from pallas_kernels.lora_steps.api import Shrunk
from pallas_kernels.pages import LoRAPages
from pallas_kernels.plan.api import RoutingPlan, row_experts
from pallas_kernels.routed_experts.projections import (
    IN,
    OUT,
    Call,
    Products,
    Rows,
    Tables,
    adapters_of,
    backward_implementation,
    combine,
    down_of,
    products_of,
    routed,
    shrink_cotangent,
    those_of,
    transposed,
)
from pallas_kernels.routed_experts.weights import ExpertWeights


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
    return combine(down_of(call, gated, experts, adapters, plan, steps_out), weights, plan).astype(x.dtype)


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
        rows = token_rows(x, plan, call.implementation, clear=False)
        gated, products = products_of(call, rows, experts, adapters, plan)
        down = down_of(call, gated, experts, adapters, plan, products.shrunk_out)
        y = combine(down, weights, plan).astype(x.dtype)
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
    if products is None:
        _, products = products_of(call, rows_x, experts, adapters, plan)
    # The barrier keeps XLA from keeping float32 values that both passes compute from these.
    gate, up = jax.lax.optimization_barrier((products.gate, products.up))
    owned = (row_experts(plan) < plan.group_sizes.shape[0])[:, None]  # the other rows hold anything
    share = jnp.append(weights.reshape(pairs), 0.0)[plan.order]  # the router's, of each sorted row

    shrunk = {"down": shrink_cotangent(call, rows_dy, "down", adapters, plan, products)}
    z = transposed(call, {"down": rows_dy}, experts, adapters, plan, shrunk).astype(jnp.float32)
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
    shrunk |= {name: shrink_cotangent(call, d, name, adapters, plan, products) for name, d in cotangents.items()}
    dx = jnp.zeros_like(x)
    if wanted.x:
        rows = transposed(call, cotangents, experts, adapters, plan, shrunk)
        dx = combine(rows, jnp.ones(weights.shape, jnp.float32), plan).astype(dtype)

    ends = {"gate": (rows_x, dgate, None), "up": (rows_x, dup, None), "down": (rows_gated, rows_dy, share)}
    dexperts = _expert_gradients(wanted.experts, experts, ends, plan)
    sums = _page_gradients(call, wanted.pools, adapters, ends, plan, products, shrunk)
    dpools = _of_pools(call, pools, sums)
    # Together, so that a layer's rows are given up before the next layer's are made.
    dx, dpools = jax.lax.optimization_barrier((dx, dpools))
    return dx, dweights, dexperts, dpools, [None] * len(leaves)


Ends = dict[str, tuple[Rows, Rows, Array | None]]  # of each projection its rows, their cotangents, and a share of each


def _expert_gradients(
    wanted: frozenset[str], experts: ExpertWeights, ends: Ends, plan: RoutingPlan
) -> dict[str, Array | None]:
    """Of the arrays that are asked for, zeros for the others."""

    def gradient(name: str, value: Array | None) -> Array | None:
        if value is None or name not in wanted:
            return None if value is None else jnp.zeros_like(value)
        rows, dy, share = ends[name.removesuffix("_bias")]
        if name.endswith("_bias"):
            rows = jnp.ones((dy.shape[0], 1), dy.dtype)
        if share is not None:
            rows = share[:, None] * rows.astype(jnp.float32)
            dy = dy.astype(jnp.float32)
        total = weight_gradient(rows, dy, plan).astype(value.dtype)
        return total[:, :, 0] if name.endswith("_bias") else total

    return {name: gradient(name, value) for name, value in vars(experts).items()}


def _page_gradients(
    call: Call,
    wanted: frozenset[int],
    adapters: dict[str, LoRAPages],
    ends: Ends,
    plan: RoutingPlan,
    products: Products,
    shrunk: dict[str, Shrunk | None],
) -> dict[str, tuple[Array, Array]]:
    """Of each module that has pages in a pool that is asked for."""
    asked = {name for name, *places in call.pools if not wanted.isdisjoint(places)}
    found: dict[str, tuple[Array, Array]] = {}
    for names, of_rows in ((IN, products.shrunk_in), (OUT, products.shrunk_out)):
        rows, _, share = ends[names[0]]
        sums = page_gradients(
            rows,
            [ends[name][1] for name in names],
            tuple(adapters[name] if name in asked else None for name in names),
            plan,
            backward_implementation(call),
            share=share,
            shrunk=(of_rows, [shrunk[name] for name in names]),
        )
        found |= {name: own for name, own in zip(names, sums, strict=True) if own is not None}
    return found


def _of_pools(call: Call, pools: list[Array], sums: dict[str, tuple[Array, Array]]) -> list[Array]:
    """Of each pool the sum over the modules whose pages it holds."""
    totals: list[Array | None] = [None] * len(pools)
    for name, *places in call.pools:
        for index, own in zip(places, sums.get(name, ()), strict=False):
            before = totals[index]
            totals[index] = own if before is None else before + own
    return [
        jnp.zeros_like(pool) if total is None else total.astype(pool.dtype)
        for pool, total in zip(pools, totals, strict=True)
    ]


_layer.defvjp(_forward, _backward, symbolic_zeros=True)

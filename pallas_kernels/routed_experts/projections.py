"""What the layer's forward and backward pass are made of: its projections, their adapters, and the weighted sum."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.activations import Activation
from pallas_kernels.backend import Implementation
from pallas_kernels.grouped_lora.api import shrink
from pallas_kernels.grouped_matmul.api import gated_products, grouped_matmul, input_gradient, lora_steps
from pallas_kernels.lora_steps.api import Shrunk
from pallas_kernels.pages import LoRAPages
from pallas_kernels.plan.api import RoutingPlan
from pallas_kernels.routed_experts.weights import ExpertWeights

IN, OUT = ("gate", "up"), ("down",)
Rows = Float[Array, "Q _width"]


@dataclass(frozen=True)
class Call:
    """What is static.

    Attributes:
      pools: for each module that has adapters, which of the arrays hold its pages of A and of B.
      indices: of what tables and plan are made of: arrays that nothing is differentiated by.
    """

    activation: Activation
    implementation: Implementation
    remat: bool
    pools: tuple[tuple[str, int, int], ...]
    max_rank: int
    indices: jax.tree_util.PyTreeDef


class Tables(NamedTuple):
    """Of one module, as in `LoRAPages`."""

    table: Int[Array, "S E 4"]
    scale: Float[Array, "S E"]


def combine(rows: Rows, weights: Float[Array, "T K"], plan: RoutingPlan) -> Float[Array, "T D"]:
    """Sums each token's rows by router weight, in float32 and in the order of its experts; skipped pairs give zeros."""
    tokens, top_k = weights.shape
    position, live = plan.position.reshape(tokens, top_k), routed(plan).reshape(tokens, top_k)
    total = jnp.zeros((tokens, rows.shape[1]), jnp.float32)
    for k in range(top_k):
        term = weights[:, k : k + 1] * rows[position[:, k]].astype(jnp.float32)
        total = total + jnp.where(live[:, k : k + 1], term, 0.0)
    return total


def routed(plan: RoutingPlan) -> Array:
    """Bool `[P]`: the pairs that the plan does not skip."""
    return plan.position < plan.group_starts[-1] + plan.group_sizes[-1]


def adapters_of(call: Call, dtype, pools, tables) -> dict[str, LoRAPages]:
    """The modules' pages, in the rows' dtype: float32 ones of an adapter that is trained are rounded here."""
    cast = [pool.astype(dtype) for pool in pools]
    return {
        name: LoRAPages(cast[a], cast[b], tables[name].table, tables[name].scale, call.max_rank)
        for name, a, b in call.pools
    }


def those_of(adapters: dict[str, LoRAPages], modules: tuple[str, ...]) -> tuple[LoRAPages | None, ...]:
    return tuple(adapters.get(module) for module in modules)


def down_of(call: Call, gated: Rows, experts: ExpertWeights, adapters, plan, steps) -> Rows:
    return grouped_matmul(
        gated,
        experts.down,
        plan,
        biases=(experts.down_bias,),
        adapters=those_of(adapters, OUT),
        steps=steps,
        dtype=gated.dtype,
        implementation=call.implementation,
    )


class Products(NamedTuple):
    """What the forward pass keeps. shrunk_in, shrunk_out: of x's rows, and of the gated product (see `Shrunk`)."""

    gate: Rows
    up: Rows
    shrunk_in: Shrunk | None
    shrunk_out: Shrunk | None


def products_of(call: Call, rows: Rows, experts: ExpertWeights, adapters, plan) -> tuple[Rows, Products]:
    """The gated product, and what it is made of."""
    steps_in, steps_out = lora_steps(plan, (those_of(adapters, IN), those_of(adapters, OUT)), call.implementation)
    shrunk_in = shrink(rows, those_of(adapters, IN), plan, steps_in, call.implementation)
    gated, gate, up = gated_products(
        rows,
        (experts.gate, experts.up),
        plan,
        biases=(experts.gate_bias, experts.up_bias),
        adapters=those_of(adapters, IN),
        steps=shrunk_in,
        activation=call.activation,
        implementation=call.implementation,
    )
    shrunk_out = shrink(gated, those_of(adapters, OUT), plan, steps_out, call.implementation)
    return gated, Products(gate, up, shrunk_in, shrunk_out)


def shrink_cotangent(call: Call, dy: Rows, name: str, adapters, plan, products: Products) -> Shrunk | None:
    """`dy B` of a projection's rows, by the lists that the forward pass made."""
    forward = products.shrunk_out if name in OUT else products.shrunk_in
    if name not in adapters or forward is None:
        return None
    steps = forward.steps.transposed(0 if name in OUT else IN.index(name))
    return shrink(dy, (adapters[name].transposed(),), plan, steps, call.implementation)


def transposed(
    call: Call, cotangents: dict[str, Rows], experts: ExpertWeights, adapters, plan, shrunk: dict[str, Shrunk | None]
) -> Rows:
    """What the cotangents of projections that share their rows give for these: through weights and adapters."""
    names = tuple(cotangents)
    return input_gradient(
        list(cotangents.values()),
        [getattr(experts, name) for name in names],
        plan,
        adapters=those_of(adapters, names),
        shrunk=[shrunk[name] for name in names],
        implementation=backward_implementation(call),
    )


def backward_implementation(call: Call) -> Implementation:
    """The portable kernels have no backward forms; XLA reads their plans."""
    return "xla" if call.implementation == "portable" else call.implementation

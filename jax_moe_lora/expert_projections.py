"""What the layer's forward and backward pass are made of: its projections, their adapters, and the weighted sum."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_moe_lora.types import ExpertWeights
from pallas_kernels import Activation, Implementation, LoRAPages, RoutingPlan, grouped_matmul
from pallas_kernels.activations import gated_unit

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


def products_of(call: Call, rows: Rows, experts: ExpertWeights, adapters, plan) -> tuple[Rows, Rows]:
    """Gate's and up's, apart."""
    gate, up = (
        grouped_matmul(
            rows,
            getattr(experts, name),
            plan,
            biases=(getattr(experts, f"{name}_bias"),),
            adapters=those_of(adapters, (name,)),
            dtype=rows.dtype,
            implementation=call.implementation,
        )
        for name in IN
    )
    return gate, up


def unit(call: Call, gate: Rows, up: Rows) -> Rows:
    """The gated product, in float32 inside."""
    return gated_unit(call.activation, gate.astype(jnp.float32), up.astype(jnp.float32)).astype(gate.dtype)


def transposed(call: Call, dy: Rows, name: str, experts: ExpertWeights, adapters, plan) -> Rows:
    """What `dy` of a projection gives for its input rows: through the weights, and through the adapters."""
    pages = adapters.get(name)
    return grouped_matmul(
        dy,
        getattr(experts, name),
        plan,
        transposed=True,
        adapters=() if pages is None else (pages.transposed(),),
        dtype=dy.dtype,
        implementation=backward_implementation(call),
    )


def backward_implementation(call: Call) -> Implementation:
    """The portable kernels have no backward forms; XLA reads their plans."""
    return "xla" if call.implementation == "portable" else call.implementation

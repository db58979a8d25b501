"""What the layer's forward and backward pass are made of: its projections and their adapters."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from pallas_kernels.activations import Activation
from pallas_kernels.grouped_lora.api import shrink
from pallas_kernels.grouped_matmul.api import gated_products, grouped_matmul, input_gradient
from pallas_kernels.lora_steps.api import LoRASteps, Shrunk, make_lora_steps
from pallas_kernels.pages import LayerPages
from pallas_kernels.plan.api import RoutingPlan
from pallas_kernels.routed_experts.weights import ExpertWeights

IN, OUT = ("gate", "up"), ("down",)
Rows = Float[Array, "Q _width"]


@dataclass(frozen=True)
class LayerCall:
    """What is static in one call of the layer.

    Attributes:
      activation: of the gated unit.
      remat: the backward pass multiplies gate and up again.
      plan: the structure of the plan, whose arrays are passed beside it: nothing is differentiated by them.
    """

    activation: Activation
    remat: bool
    plan: jax.tree_util.PyTreeDef


class Products(NamedTuple):
    """What the forward pass keeps.

    Attributes:
      gate: gate's product.
      up: up's product.
      shrunk_in: what gate's and up's adapters made of x's rows.
      shrunk_out: what down's adapters made of the gated product.
    """

    gate: Rows
    up: Rows
    shrunk_in: Shrunk | None
    shrunk_out: Shrunk | None


def layer_steps(adapters: LayerPages, plan: RoutingPlan) -> list[LoRASteps | None]:
    """The steps of gate and up, and of down."""
    return make_lora_steps(plan, (adapters.select(*IN), adapters.select(*OUT)))


def down_projection(
    gated: Rows, experts: ExpertWeights, adapters: LayerPages, plan: RoutingPlan, steps: LoRASteps | Shrunk | None
) -> Rows:
    """The gated rows through down, with its adapters."""
    return grouped_matmul(
        gated,
        experts.down,
        plan,
        biases=(experts.down_bias,),
        adapters=adapters.select(*OUT),
        steps=steps,
        dtype=gated.dtype,
    )


def gate_and_up(
    call: LayerCall, rows: Rows, experts: ExpertWeights, adapters: LayerPages, plan: RoutingPlan
) -> tuple[Rows, Products]:
    """The gated product, and what it is made of."""
    steps_in, steps_out = layer_steps(adapters, plan)
    shrunk_in = shrink(rows, adapters.select(*IN), plan, steps_in)
    gated, gate, up = gated_products(
        rows,
        (experts.gate, experts.up),
        plan,
        biases=(experts.gate_bias, experts.up_bias),
        adapters=adapters.select(*IN),
        steps=shrunk_in,
        activation=call.activation,
    )
    shrunk_out = shrink(gated, adapters.select(*OUT), plan, steps_out)
    return gated, Products(gate, up, shrunk_in, shrunk_out)


def shrink_cotangent(
    dy: Rows, module: str, adapters: LayerPages, plan: RoutingPlan, products: Products
) -> Shrunk | None:
    """`dy B` of a projection's rows, by the lists that the forward pass made."""
    forward = products.shrunk_out if module in OUT else products.shrunk_in
    if module not in adapters or forward is None:
        return None
    steps = forward.steps.transposed(0 if module in OUT else IN.index(module))
    return shrink(dy, adapters.select(module).transposed(), plan, steps)


def rows_gradient(
    cotangents: dict[str, Rows],
    experts: ExpertWeights,
    adapters: LayerPages,
    plan: RoutingPlan,
    shrunk: dict[str, Shrunk | None],
) -> Rows:
    """The cotangent of the rows that projections share, from those of their products: through weights and adapters."""
    modules = tuple(cotangents)
    return input_gradient(
        list(cotangents.values()),
        [getattr(experts, module) for module in modules],
        plan,
        adapters=adapters.select(*modules),
        shrunk=[shrunk[module] for module in modules],
    )

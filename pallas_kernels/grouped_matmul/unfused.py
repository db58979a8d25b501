"""The grouped matmul and its backward forms as a matmul, then a LoRA op: for backends that have both apart."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.activations import Activation, gated_unit
from pallas_kernels.grouped_matmul.biases import Biases
from pallas_kernels.lora_steps.api import LoRASteps, Shrunk
from pallas_kernels.pages import LayerPages, LoRAPages
from pallas_kernels.plan.api import RoutingPlan
from pallas_kernels.quantised.array import Quantised, Weights

Multiply = Callable[..., Float[Array, "Q out"]]
"""`multiply(x, weights, plan, row_index, bias, transposed)`: `x[row_index[r]] @ W[e].T + b[e]` of each sorted row in
float32, or `x[row_index[r]] @ W[e]`."""

AddLoRA = Callable[..., Float[Array, "Q out"]]
"""`add_lora(y, x, pages, plan, row_index)`: what `grouped_lora.api.grouped_lora` promises."""


def grouped_matmul(
    multiply: Multiply,
    add_lora: AddLoRA,
    x: Float[Array, "M in"],
    weights: tuple[Float[Array, "E out in"] | Quantised, ...],
    plan: RoutingPlan,
    *,
    of_tokens: bool,
    biases: Biases,
    adapters: LayerPages,
    steps: LoRASteps | Shrunk | None,
    activation: Activation,
) -> Float[Array, "Q out"]:
    """What `api.grouped_matmul` promises, in float32."""
    del steps
    row_index = plan.token if of_tokens else None
    products = _products(multiply, add_lora, x, weights, plan, biases, adapters, row_index)
    return products[0] if len(products) == 1 else gated_unit(activation, *products)


def gated_products(
    multiply: Multiply,
    add_lora: AddLoRA,
    x: Float[Array, "Q in"],
    weights: tuple[Float[Array, "E out in"] | Quantised, ...],
    plan: RoutingPlan,
    *,
    biases: Biases,
    adapters: LayerPages,
    steps: LoRASteps | Shrunk | None,
    activation: Activation,
) -> tuple[Float[Array, "Q out"], Float[Array, "Q out"], Float[Array, "Q out"]]:
    """What `api.gated_products` promises."""
    del steps
    gate, up = _products(multiply, add_lora, x, weights, plan, biases, adapters, None)
    return gated_unit(activation, gate, up).astype(x.dtype), gate.astype(x.dtype), up.astype(x.dtype)


def input_gradient(
    multiply: Multiply,
    add_lora: AddLoRA,
    dys: tuple[Float[Array, "Q out"], ...],
    weights: tuple[Float[Array, "E out in"] | Quantised, ...],
    plan: RoutingPlan,
    *,
    adapters: LayerPages,
    shrunk: tuple[Shrunk | None, ...],
) -> Float[Array, "Q in"]:
    """What `api.input_gradient` promises."""
    del shrunk
    total = jnp.zeros((), jnp.float32)
    for nth, (dy, weight, pages) in enumerate(zip(dys, weights, adapters.projections, strict=True)):
        product = multiply(dy, weight, plan, None, None, True)
        total = product if nth == 0 else total + product
        if pages is not None:
            total = add_lora(total, dy, pages.transposed(), plan, None)
    return total.astype(dys[0].dtype)


def _products(
    multiply: Multiply,
    add_lora: AddLoRA,
    x: Array,
    weights: tuple[Weights, ...],
    plan: RoutingPlan,
    biases: Biases,
    adapters: LayerPages,
    row_index: Array | None,
) -> list[Array]:
    """Each projection's rows in float32."""

    def project(weight: Weights, bias: Array | None, pages: LoRAPages | None) -> Array:
        y = multiply(x, weight, plan, row_index, bias, False)
        return y if pages is None else add_lora(y, x, pages, plan, row_index)

    return [project(*each) for each in zip(weights, biases, adapters.projections, strict=True)]

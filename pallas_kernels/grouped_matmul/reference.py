"""The definition of the grouped matmul: every row times every expert's weight, the row's own kept. For reading."""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_lora import reference as reference_lora
from pallas_kernels.grouped_matmul import unfused
from pallas_kernels.plan.api import RoutingPlan, row_experts
from pallas_kernels.quantised.api import dense
from pallas_kernels.quantised.array import Quantised


def multiply(
    x: Float[Array, "M in"],
    weights: Float[Array, "E _out _in"] | Quantised,
    plan: RoutingPlan,
    row_index: Int[Array, "Q"] | None,
    bias: Float[Array, "E out"] | None = None,
    transposed: bool = False,
) -> Float[Array, "Q out"]:
    """`unfused.Multiply`."""
    rows = x if row_index is None else x[row_index]
    expert = row_experts(plan)  # E for skipped rows
    products = jnp.einsum(
        "pi,eio->epo" if transposed else "pi,eoi->epo",
        rows.astype(jnp.float32),
        dense(weights, x.dtype).astype(jnp.float32),
        precision=lax.Precision.HIGHEST,
    )
    if bias is not None:
        products = products + bias.astype(jnp.float32)[:, None]
    is_expert = expert[None, :, None] == jnp.arange(weights.shape[0])[:, None, None]
    return jnp.where(is_expert, products, 0.0).sum(0)


grouped_matmul = partial(unfused.grouped_matmul, multiply, reference_lora.grouped_lora)
gated_products = partial(unfused.gated_products, multiply, reference_lora.grouped_lora)
input_gradient = partial(unfused.input_gradient, multiply, reference_lora.grouped_lora)

"""The portable backend's host side: gathers rows, lists the adapters' steps, runs shrink and matmul."""

from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.activations import Activation, gated_unit
from pallas_kernels.grouped_lora import portable_shrink
from pallas_kernels.grouped_lora.pools import pools_of_a
from pallas_kernels.grouped_matmul import portable_kernel
from pallas_kernels.grouped_matmul.biases import Biases
from pallas_kernels.lora_steps.api import LoRASteps, Shrunk
from pallas_kernels.lora_steps.xla import make_packed_steps
from pallas_kernels.pages import LayerPages
from pallas_kernels.plan.api import RoutingPlan
from pallas_kernels.portable.tuning import PortableConfig, heuristic


def grouped_matmul(
    x: Float[Array, "M in"],
    weights: tuple[Float[Array, "E out in"], ...],
    plan: RoutingPlan,
    *,
    of_tokens: bool,
    biases: Biases,
    adapters: LayerPages,
    steps: LoRASteps | Shrunk | None = None,
    activation: Activation,
    config: PortableConfig | None = None,
) -> Float[Array, "Q out"]:
    """What `api.grouped_matmul` promises, by the portable kernels.

    Args:
      x: as in `api.grouped_matmul`.
      weights: one weight, or a pair.
      plan: as in `api.grouped_matmul`.
      of_tokens: as there.
      biases: for each weight its bias, or None.
      adapters: for each weight its pages.
      steps: as there; not used.
      activation: as there.
      config: how to cut; the heuristic's where None.
    """
    del steps
    config = config or heuristic(plan.tiles.size, len(weights), weights[0].shape[1])
    rows = x[plan.token] if of_tokens else x
    unit = partial(gated_unit, activation) if len(weights) == 2 else None
    if not adapters.modules:
        return portable_kernel.grouped_matmul(rows, weights, plan.tiles, config, unit, biases=biases)
    pages = adapters.pad_with_empty_pages()
    packed = make_packed_steps(plan, plan.tiles, pages)
    hidden = portable_shrink.shrink(rows, pools_of_a(adapters), plan.tiles, packed)
    pools_of_b = tuple(pages.pools[place.b] for place in pages.places)
    return portable_kernel.grouped_matmul(rows, weights, plan.tiles, config, unit, packed, hidden, pools_of_b, biases)


def gated_products(
    x: Float[Array, "Q in"],
    weights: tuple[Float[Array, "E out in"], ...],
    plan: RoutingPlan,
    *,
    biases: Biases,
    adapters: LayerPages,
    steps: LoRASteps | Shrunk | None,
    activation: Activation,
) -> tuple[Float[Array, "Q out"], Float[Array, "Q out"], Float[Array, "Q out"]]:
    """What `api.gated_products` promises: two products, and the gated unit through XLA."""
    gate, up = (
        grouped_matmul(
            x,
            (weight,),
            plan,
            of_tokens=False,
            biases=(bias,),
            adapters=adapters.select(place.module),
            activation=activation,
        )
        for weight, bias, place in zip(weights, biases, adapters.places, strict=True)
    )
    gated = gated_unit(activation, gate.astype(jnp.float32), up.astype(jnp.float32))
    return gated.astype(x.dtype), gate, up

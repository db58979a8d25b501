"""The Hopper backend's host side: gathers rows, lists the adapters' steps, runs shrink and matmul."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import mosaic
from pallas_kernels.activations import ACTIVATIONS, Activation
from pallas_kernels.backend import UnsupportedImplementation
from pallas_kernels.dispatch import dispatch
from pallas_kernels.grouped_lora import hopper as lora
from pallas_kernels.grouped_lora.pages import LoRAPages
from pallas_kernels.grouped_matmul import hopper
from pallas_kernels.plan import RoutingPlan, cut_groups
from pallas_kernels.steps import make_steps

TENSOR_ROWS = 256  # mean rows an expert from which the tensor form is the faster one
MAX_STREAM_ROWS = 128


def grouped_matmul(
    x: Float[Array, "M in"],
    weights: tuple[Float[Array, "E out in"], ...],
    plan: RoutingPlan,
    of_tokens: bool,
    adapters: tuple[LoRAPages | None, ...],
    activation: Activation,
    config: hopper.Config | None = None,
) -> Float[Array, "Q out"]:
    if plan.alignment % mosaic.ROW_ALIGNMENT:
        raise UnsupportedImplementation(
            f"The plan's alignment is {plan.alignment}; hopper needs a multiple of {mosaic.ROW_ALIGNMENT} "
            "(make_plan's argument)."
        )
    pairs, num_experts = plan.position.shape[0], weights[0].shape[0]
    config = config or heuristic(pairs, num_experts)
    tiles = cut_groups(plan.group_sizes, plan.group_starts, pairs, config.tile_rows)
    rows = dispatch(x, plan.position, plan.order.shape[0], config.num_sms) if of_tokens else x
    unit = ACTIVATIONS[activation] if len(weights) == 2 else None
    if all(pages is None for pages in adapters):
        return hopper.grouped_matmul(rows, weights, tiles, config, unit)
    pages = tuple(_nothing(adapters) if own is None else own for own in adapters)
    steps = make_steps(plan, tiles, pages)
    pools = (pages[0].a,) if pages[0].a is pages[-1].a else (pages[0].a, pages[-1].a)
    hidden = lora.shrink(rows, pools, tiles, steps, config.num_sms)
    return hopper.grouped_matmul(rows, weights, tiles, config, unit, steps, hidden, tuple(p.b for p in pages))


def heuristic(pairs: int, num_experts: int) -> hopper.Config:
    """A config that is valid for every shape; from static sizes alone, so that a row's bits are."""
    mean = pairs / num_experts
    if mean >= TENSOR_ROWS:
        form: Any = "tensor"
        rows = mosaic.PART
    else:
        form = "stream"
        likely = mean + 3 * mean**0.5  # rows of all but one expert in a thousand, under uniform routing
        rows = min(max(8, -(-int(likely) // 8) * 8), MAX_STREAM_ROWS)
    config = hopper.Config(form, rows, 2)
    while hopper.smem_bytes(larger := _with_stages(config, config.stages + 1)) <= mosaic.SMEM_BYTES - 1024:
        config = larger
    return config


def _with_stages(config: hopper.Config, stages: int) -> hopper.Config:
    return hopper.Config(config.form, config.tile_rows, stages, config.num_sms)


def _nothing(adapters: tuple[LoRAPages | None, ...]) -> LoRAPages:
    """For a projection without adapters beside one that has them: the same pools, and no slot in use."""
    other = next(pages for pages in adapters if pages is not None)
    return LoRAPages(other.a, other.b, jnp.zeros_like(other.table), jnp.zeros_like(other.scale), other.max_rank)

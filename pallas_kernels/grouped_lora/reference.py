"""The definition of the grouped LoRA op: page by page, every row against its own page. For reading."""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_lora.projections import each_projection
from pallas_kernels.pages import RANK_PAGE, LoRAPages
from pallas_kernels.plan.api import RoutingPlan, row_experts, row_slots
from pallas_kernels.varying import varying_as


def grouped_lora(
    y: Float[Array, "Q out"],
    x: Float[Array, "M in"],
    pages: LoRAPages,
    plan: RoutingPlan,
    row_index: Int[Array, "Q"] | None,
) -> Float[Array, "Q out"]:
    """What `api.grouped_lora` promises."""
    rows = (x if row_index is None else x[row_index]).astype(jnp.float32)
    expert, slot = row_experts(plan), row_slots(plan)
    adapted = (slot >= 0) & (expert < pages.table.shape[1])
    first_a, first_b, count, _ = jnp.moveaxis(pages.table[slot, expert], -1, 0)
    scale = pages.scale[slot, expert][:, None]

    def add_page(carry):
        page, total = carry
        live = adapted & (page < count)
        a = pages.a[jnp.where(live, first_a + page, 0)].astype(jnp.float32)
        b = pages.b[jnp.where(live, first_b + page, 0)].astype(jnp.float32)
        hidden = scale * jnp.einsum("pi,pri->pr", rows, a, precision=lax.Precision.HIGHEST)
        update = jnp.einsum("pr,pro->po", hidden, b, precision=lax.Precision.HIGHEST)
        return page + 1, jnp.where(live[:, None], total + update, total)

    largest = jnp.where(adapted, count, 0).max(initial=0)
    begin = varying_as((jnp.int32(0), y), x, pages, plan, row_index)
    return lax.while_loop(lambda carry: carry[0] < largest, add_page, begin)[1]


def projection_gradients(
    x: Float[Array, "Q in"],
    dy: Float[Array, "Q out"],
    pages: LoRAPages,
    plan: RoutingPlan,
    share: Float[Array, "Q"] | None,
) -> tuple[Float[Array, "N_A 16 in"], Float[Array, "N_B 16 out"]]:
    """What `api.page_gradients` promises, of one projection."""
    expert, slot = row_experts(plan), row_slots(plan)
    adapted = (slot >= 0) & (expert < pages.table.shape[1])
    first_a, first_b, count, _ = jnp.moveaxis(pages.table[slot, expert], -1, 0)
    scale = pages.scale[slot, expert][:, None]
    rows, others = (jnp.where(adapted[:, None], v, 0).astype(jnp.float32) for v in (x, dy))
    if share is not None:
        rows = jnp.where(adapted, share, 0)[:, None] * rows
    total_a, total_b = jnp.zeros(pages.a.shape, jnp.float32), jnp.zeros(pages.b.shape, jnp.float32)
    for page in range(-(-pages.max_rank // RANK_PAGE)):
        live = adapted & (page < count)
        a, b = jnp.where(live, first_a + page, 0), jnp.where(live, first_b + page, 0)
        own_a, own_b = pages.a[a].astype(jnp.float32), pages.b[b].astype(jnp.float32)
        hidden = scale * jnp.einsum("pi,pri->pr", rows, own_a, precision=lax.Precision.HIGHEST)
        dhidden = scale * jnp.einsum("po,pro->pr", others, own_b, precision=lax.Precision.HIGHEST)
        each_a, each_b = dhidden[:, :, None] * rows[:, None], hidden[:, :, None] * others[:, None]
        total_a = total_a.at[a].add(jnp.where(live[:, None, None], each_a, 0))
        total_b = total_b.at[b].add(jnp.where(live[:, None, None], each_b, 0))
    return total_a, total_b


page_gradients = partial(each_projection, projection_gradients)

"""Grouped LoRA through XLA, on any device: a loop over the (expert, slot) tiles in use, and over each one's pages."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.constants import RANK_PAGE
from pallas_kernels.grouped_lora.projections import each_projection
from pallas_kernels.pages import LoRAPages
from pallas_kernels.plan.api import RoutingPlan
from pallas_kernels.plan.tiles import Tiles
from pallas_kernels.varying import varying_as
from pallas_kernels.xla.dot import batched_matmul_t, matmul_t, outer
from pallas_kernels.xla.tile_loop import over_tiles, window


def grouped_lora(
    y: Float[Array, "Q out"],
    x: Float[Array, "M in"],
    pages: LoRAPages,
    plan: RoutingPlan,
    row_index: Int[Array, "Q"] | None,
) -> Float[Array, "Q out"]:
    """What `api.grouped_lora` promises."""
    return _add_updates(plan.lora_tiles, y, x, pages, row_index)


# Jitted, so that projections of the same shapes share one trace.
@jax.jit
def _add_updates(
    tiles: Tiles,
    y: Float[Array, "Q out"],
    x: Float[Array, "M in"],
    pages: LoRAPages,
    row_index: Int[Array, "Q"] | None,
) -> Float[Array, "Q out"]:
    table, scales = pages.table[tiles.slot, tiles.expert], pages.scale[tiles.slot, tiles.expert]

    def tile(index, rows, old):
        first_a, first_b, count, _ = jnp.unstack(table[index], axis=-1)
        scale = scales[index][:, None, None]
        tile_x = x[rows if row_index is None else row_index[rows]]

        def add_page(page, total):
            live = page < count
            hidden = scale * batched_matmul_t(tile_x, pages.a[jnp.where(live, first_a + page, 0)])
            # B is read as float32 so that the float32 hidden row is not rounded to the adapter's dtype.
            b = pages.b[jnp.where(live, first_b + page, 0)].astype(jnp.float32)
            update = lax.dot_general(hidden, b, (((2,), (1,)), ((0,), (0,))), precision=lax.Precision.HIGHEST)
            return jnp.where(live[:, None, None], total + update, total)

        if pages.max_rank <= RANK_PAGE:  # no loop to compile
            return add_page(0, old)
        return lax.fori_loop(0, count.max(), add_page, old)

    return over_tiles(tiles, y, tile, (x, pages, row_index))


def projection_gradients(
    x: Float[Array, "Q in"],
    dy: Float[Array, "Q out"],
    pages: LoRAPages,
    plan: RoutingPlan,
    share: Float[Array, "Q"] | None,
) -> tuple[Float[Array, "N_A 16 in"], Float[Array, "N_B 16 out"]]:
    """What `api.page_gradients` promises, of one projection."""
    tiles = plan.lora_tiles
    x = x.astype(jnp.float32) if share is None else share[:, None] * x.astype(jnp.float32)

    def tile(index, totals):
        expert, rows, others = window(tiles, index, x, dy.astype(jnp.float32))
        slot = tiles.slot[index]
        first_a, first_b, count, _ = pages.table[slot, expert]
        scale = pages.scale[slot, expert]

        def page(number, totals):
            total_a, total_b = totals
            a, b = first_a + number, first_b + number
            hidden = scale * matmul_t(rows, pages.a[a].astype(jnp.float32))
            dhidden = scale * matmul_t(others, pages.b[b].astype(jnp.float32))
            return total_a.at[a].add(outer(dhidden, rows)), total_b.at[b].add(outer(hidden, others))

        return lax.fori_loop(0, count, page, totals)

    zeros = jnp.zeros(pages.a.shape, jnp.float32), jnp.zeros(pages.b.shape, jnp.float32)
    zeros = varying_as(zeros, x, dy, pages, plan)
    return lax.fori_loop(0, tiles.count.reshape(-1)[0], tile, zeros)


page_gradients = partial(each_projection, projection_gradients)

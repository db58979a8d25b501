"""Grouped LoRA through XLA, on any device: a loop over the (expert, slot) tiles in use, and over each one's pages."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_lora.pages import LoRAPages
from pallas_kernels.grouped_matmul.xla import matmul_t
from pallas_kernels.plan import RoutingPlan
from pallas_kernels.tiles import over_tiles


def grouped_lora(
    y: Float[Array, "P out"],
    x: Float[Array, "M in"],
    pages: LoRAPages,
    plan: RoutingPlan,
    row_index: Int[Array, "P"] | None,
) -> Float[Array, "P out"]:
    tiles = plan.lora_tiles
    if tiles.expert.shape[0] == 0:
        return y

    def tile(index, rows, old):
        expert, slot = tiles.expert[index], tiles.slot[index]
        first_a, first_b, count, _ = pages.table[slot, expert]
        scale = pages.scale[slot, expert]
        own = x[rows if row_index is None else row_index[rows]]

        def add_page(page, total):
            hidden = scale * matmul_t(own, pages.a[first_a + page])
            # B is read as float32 so that the float32 hidden row is not rounded to the adapter's dtype.
            update = lax.dot(hidden, pages.b[first_b + page].astype(jnp.float32), precision=lax.Precision.HIGHEST)
            return total + update

        return lax.fori_loop(0, count, add_page, old)

    return over_tiles(tiles, y, tile)

"""The shrink by mma.sync: each LoRA step's rows times the A pages that it needs, as a masked H for the expand.

A block computes one step (see `lora_steps/api.py`): four accumulators of the tile's rows times the 16 ranks of a page,
over stages of 64 elements of K that `emit_pipeline` brings into shared memory: the rows, and the four pages.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic
from pallas_kernels.lora_steps.entries import BEGIN, END, PAGE_A, PAGES_A_STEP, RANKS, SCALE
from pallas_kernels.lora_steps.xla import PackedSteps
from pallas_kernels.pages import RANK_PAGE
from pallas_kernels.plan.tiles import Tiles
from pallas_kernels.portable.ring import compiler_params, iota, release_stage, staged
from pallas_kernels.portable.tuning import DEPTH, SHRINK_STAGES


def shrink(
    x: Float[Array, "Q in"], pools: tuple[Float[Array, "_pages 16 in"], ...], tiles: Tiles, steps: PackedSteps
) -> Float[Array, "N rows 64"]:
    """H of every LoRA step: `scale * x[r] @ A.T` in each entry's own rows, zeros in the tile's others.

    Args:
      x: rows in sorted order, each tile's first row a multiple of `tiles.size`, which is 32 or 64.
      pools: the pool of A pages, or one for each of two projections (see `PackedSteps`). Page 0 is zeros.
      tiles: the plan's.
      steps: the adapters' steps of these tiles.

    Returns:
      `[N, tiles.size, 64]` in x's dtype; steps that are not in use are not written.
    """
    width, tile_rows = x.shape[1], tiles.size

    def body(tile_of, start_of, step_of, entries, x, *refs):
        *pools, out = refs
        step = lax.axis_index("step")

        @pl.when(step < step_of[tiles.start.shape[0]])
        def _():
            row_block = lax.div(start_of[tile_of[step]], jnp.int32(tile_rows))

            def entry(q, field):
                return entries[step * PAGES_A_STEP + q, field]

            def page_of(pool, q):
                page = entry(q, PAGE_A)
                if len(pools) == 1:
                    return page
                # A page of the other pool: the page of zeros, which adds exactly nothing.
                return jnp.maximum(page, 0) if pool == 0 else jnp.maximum(~page, 0)

            pages = [(pool, q, page_of(pool, q)) for pool in range(len(pools)) for q in range(PAGES_A_STEP)]

            def multiply(_, row_ref, *refs_and_accs):
                page_refs, accs = refs_and_accs[:-1], list(refs_and_accs[-1])
                rows = row_ref[...]
                for (_, q, _), ref in zip(pages, page_refs, strict=True):
                    accs[q] = plgpu.mma(accs[q], rows, ref.T[...])
                release_stage()
                return tuple(accs)

            accs = plgpu.emit_pipeline(
                multiply,
                grid=(width // DEPTH,),
                in_specs=[
                    staged((tile_rows, DEPTH), lambda k: (row_block, k)),
                    *[staged((None, RANK_PAGE, DEPTH), lambda k, page=page: (page, 0, k)) for _, _, page in pages],
                ],
                max_concurrent_steps=SHRINK_STAGES,
                init_carry=(jnp.zeros((tile_rows, RANK_PAGE), jnp.float32),) * PAGES_A_STEP,
            )(x, *[pools[pool] for pool, _, _ in pages])

            rows = iota((tile_rows, RANK_PAGE), x.dtype)
            for q, acc in enumerate(accs):
                mine = (rows >= entry(q, BEGIN)) & (rows < entry(q, END))
                scale = lax.bitcast_convert_type(jnp.full(rows.shape, entry(q, SCALE)), jnp.float32)
                ranks = pl.ds(q * RANK_PAGE, RANK_PAGE)
                out[step, :, ranks] = jnp.where(mine, acc * scale, 0.0).astype(out.dtype)

    kernel = mosaic.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((steps.bound, tile_rows, RANKS), x.dtype),
        grid=(steps.bound,),
        grid_names=("step",),
        compiler_params=compiler_params(),
    )
    return kernel(_tile_of(steps), tiles.start, steps.start, steps.entries, x, *pools)


def _tile_of(steps: PackedSteps) -> Int[Array, "N"]:
    """Tile of each step; one past the last for steps that are not in use."""
    number = jnp.arange(steps.bound, dtype=jnp.int32)
    return jnp.searchsorted(steps.start[1:], number, side="right").astype(jnp.int32)

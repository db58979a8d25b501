"""The shrink on Hopper: each tile's rows times the A pages that they need, as masked H tiles for the expand.

A work item is a share of one tile's LoRA steps: few tiles with many steps would not fill the SMs. Two compute
warpgroups take two steps at a time (64 ranks each, on wgmma's M side; the tile's rows on its N side), so the rows are
streamed once for eight pages. A ring stage holds 128 or 256 elements of K of eight A pages and of the rows: few large
copies, since all threads of a warpgroup arrive for each.
`full[s]` counts nine TMA copies; `half_full[s]` five, where a last step is alone and one warpgroup has nothing to do;
`empty[s]` the two warpgroups.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import mosaic
from pallas_kernels.entries import BEGIN, END, PAGE_A, PAGES_A_STEP, RANKS, SCALE
from pallas_kernels.grouped_lora.pages import RANK_PAGE
from pallas_kernels.mosaic import COMPUTE_WARPGROUPS, ROW_ALIGNMENT
from pallas_kernels.plan import Tiles
from pallas_kernels.steps import Adapters, LoRASteps, Shrunk, with_nothing

MAX_SHARES = 8  # items that a tile's steps are shared out among


def shrink_adapters(
    x: Float[Array, "Q in"], adapters: Adapters, tiles: Tiles, steps: LoRASteps, num_sms: int = mosaic.NUM_SMS
) -> Shrunk:
    """`shrink` by the pools of one projection's adapters, or of two's; `steps`: of these."""
    pages = with_nothing(adapters)
    pools = (pages[0].a,) if pages[0].a is pages[-1].a else (pages[0].a, pages[-1].a)
    return Shrunk(steps, shrink(x, pools, tiles, steps, num_sms))


def shrink(
    x: Float[Array, "Q in"],
    pools: tuple[Float[Array, "_pages 16 in"], ...],
    tiles: Tiles,
    steps: LoRASteps,
    num_sms: int = mosaic.NUM_SMS,
) -> Float[Array, "N rows 64"]:
    """H of every LoRA step: `scale * x[r] @ A.T` in each entry's own rows, zeros in the tile's others.

    Args:
      x: rows in sorted order. pools: the pool of A pages, or one for each of two projections (see `LoRASteps`).

    Returns:
      `[N, tiles.size, 64]` in x's dtype; steps that are not in use are not written.
    """
    width, tile_rows = x.shape[1], tiles.size
    depth = 256 if tile_rows <= 32 else 128  # elements of K a stage; past the width TMA reads zeros
    depth_steps = pl.cdiv(width, depth)
    stages = _stages(tile_rows, depth)
    # Tiles of few rows seldom have all the steps that they could: their shares would mostly be empty.
    shares = max(1, min(MAX_SHARES, steps.max_steps // (4 if tile_rows <= 32 else 2)))

    def shrink_rows(start_of, count, first_of, steps_of, entries, x, pool0, pool1, out, **smem):
        page_ring, row_ring, out_tile, full, half_full, empty = (
            smem[name] for name in ("page_ring", "row_ring", "out_tile", "full", "half_full", "empty")
        )
        warpgroup = lax.axis_index("wg")

        def copy_page(page, some, target, barrier):
            if len(pools) == 1:
                plgpu.copy_gmem_to_smem(pool0.at[page, :, some], target, barrier)
                return

            @pl.when(page >= 0)
            def _():
                plgpu.copy_gmem_to_smem(pool0.at[page, :, some], target, barrier)

            @pl.when(page < 0)
            def _():
                plgpu.copy_gmem_to_smem(pool1.at[-1 - page, :, some], target, barrier)

        def share_of(number):
            """An item's tile, the tile's steps, and the pairs of steps that are the item's: its first, and how many."""
            share, tile = lax.div(number, count[0]), lax.rem(number, count[0])
            steps = steps_of[tile, 0]
            pairs = lax.div(steps + 1, jnp.int32(2))
            return tile, steps, share, lax.div(jnp.maximum(pairs - share + (shares - 1), 0), jnp.int32(shares))

        @pl.when(warpgroup == COMPUTE_WARPGROUPS)
        def _memory():
            mosaic.give_registers(COMPUTE_WARPGROUPS)

            def item(number, done):
                tile, steps, share, pairs = share_of(number)
                row = pl.multiple_of(start_of[tile], ROW_ALIGNMENT)

                def pair(turn, done):
                    index = share + turn * shares
                    both = 2 * index + 1 < steps
                    page_ids = [
                        entries[PAGE_A, tile, jnp.minimum(2 * index + half, steps - 1) * PAGES_A_STEP + q]
                        for half in range(COMPUTE_WARPGROUPS)
                        for q in range(PAGES_A_STEP)
                    ]

                    def copy(k, page_ids, barriers):
                        stage = mosaic.wait_until_empty(empty, done + k, stages)
                        some = pl.ds(k * depth, depth)
                        for number, page in enumerate(page_ids):
                            half, q = divmod(number, PAGES_A_STEP)
                            target = page_ring.at[stage, half, pl.ds(q * RANK_PAGE, RANK_PAGE)]
                            copy_page(page, some, target, barriers.at[stage])
                        plgpu.copy_gmem_to_smem(
                            x.at[pl.ds(row, tile_rows), some], row_ring.at[stage], barriers.at[stage]
                        )

                    pl.when(both)(lambda: pl.loop(0, depth_steps)(lambda k: copy(k, page_ids, full)))
                    pl.when(jnp.logical_not(both))(
                        lambda: pl.loop(0, depth_steps)(lambda k: copy(k, page_ids[:PAGES_A_STEP], half_full))
                    )
                    return done + depth_steps

                return lax.fori_loop(0, pairs, pair, done)

            mosaic.drain(empty, mosaic.over_items(count[0] * shares, num_sms, item), stages)

        @pl.when(warpgroup < COMPUTE_WARPGROUPS)
        def _compute():
            mosaic.take_registers(COMPUTE_WARPGROUPS)

            def item(number, done):
                tile, steps, share, pairs = share_of(number)
                first = first_of[tile, 0]

                def pair(turn, done):
                    index = share + turn * shares

                    def multiply(barriers):
                        def accumulate(acc):
                            @pl.loop(0, depth_steps)
                            def _(k):
                                stage = mosaic.stage_of(done + k, stages)
                                plgpu.barrier_wait(barriers.at[stage])
                                plgpu.wgmma(acc, page_ring.at[stage, warpgroup], row_ring.at[stage].T)
                                plgpu.wgmma_wait(0)
                                plgpu.barrier_arrive(empty.at[stage])

                            return acc[...]

                        acc = pl.run_scoped(accumulate, plgpu.ACC((RANKS, tile_rows)))
                        step = 2 * index + warpgroup
                        entry = lax.div(_iota((RANKS, tile_rows), 0), jnp.int32(RANK_PAGE))
                        rows = _iota((RANKS, tile_rows), 1)

                        def of_entry(field):
                            values = [entries[field, tile, step * PAGES_A_STEP + q] for q in range(PAGES_A_STEP)]
                            chosen = jnp.full((RANKS, tile_rows), values[0])
                            for q in range(1, PAGES_A_STEP):
                                chosen = jnp.where(entry == q, values[q], chosen)
                            return chosen

                        mine = (rows >= of_entry(BEGIN)) & (rows < of_entry(END))
                        result = jnp.where(
                            mine, acc * lax.bitcast_convert_type(of_entry(SCALE), jnp.float32), 0.0
                        ).astype(out.dtype)
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        out_tile.at[warpgroup].T[...] = plgpu.layout_cast(result, plgpu.Layout.WGMMA_TRANSPOSED)
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(out_tile.at[warpgroup], out.at[first + step])

                    def let_pass():
                        """No step for this warpgroup: it only keeps the ring going."""

                        @pl.loop(0, depth_steps)
                        def _(k):
                            stage = mosaic.stage_of(done + k, stages)
                            plgpu.barrier_wait(half_full.at[stage])
                            plgpu.barrier_arrive(empty.at[stage])

                    both = 2 * index + 1 < steps
                    alone = jnp.logical_not(both)
                    pl.when(both)(lambda: multiply(full))
                    pl.when(alone & (warpgroup == 0))(lambda: multiply(half_full))
                    pl.when(alone & (warpgroup == 1))(let_pass)
                    return done + depth_steps

                return lax.fori_loop(0, pairs, pair, done)

            mosaic.over_items(count[0] * shares, num_sms, item)
            plgpu.wait_smem_to_gmem(0)

    dtype = x.dtype
    scratch = {
        "page_ring": mosaic.tile_smem((stages, COMPUTE_WARPGROUPS, RANKS, depth), dtype),
        "row_ring": mosaic.tile_smem((stages, tile_rows, depth), dtype),
        "out_tile": mosaic.row_smem((COMPUTE_WARPGROUPS, tile_rows, RANKS), dtype),
        "full": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS * PAGES_A_STEP + 1, num_barriers=stages),
        "half_full": plgpu.Barrier(num_arrivals=PAGES_A_STEP + 1, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
    }
    kernel = mosaic.run(shrink_rows, jax.ShapeDtypeStruct((steps.bound, tile_rows, RANKS), dtype), scratch, num_sms)
    return kernel(tiles.start, tiles.count.reshape(-1), steps.first, steps.count, steps.entries, x, pools[0], pools[-1])


def _stages(tile_rows: int, depth: int) -> int:
    stage = (COMPUTE_WARPGROUPS * RANKS + tile_rows) * depth * 2
    out = COMPUTE_WARPGROUPS * tile_rows * RANKS * 2
    return min(8, (mosaic.SMEM_BYTES - mosaic.BARRIER_BYTES - out) // stage)


def _iota(shape: tuple[int, int], dimension: int) -> Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=plgpu.Layout.WGMMA)

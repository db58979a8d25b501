"""The shrink on Hopper: each tile's rows times the A pages that they need, as masked H tiles for the expand.

A work item is a share of one tile's LoRA steps: few tiles with many steps would not fill the SMs. Two compute
warpgroups take two steps at a time (64 ranks each, on wgmma's M side), so rows are streamed once for eight pages. Rows
of a tile are sorted by slot, and so are its steps: two steps need the rows of their own slots alone, a window of the
tile (on wgmma's N side, of a few widths). The rest of their H is zeros.
A ring stage holds 128 or 256 elements of K of eight A pages and of the window's rows: few large copies, since all
threads of a warpgroup arrive for each.
`full[s]` counts nine TMA copies; `half_full[s]` five, where a last step is alone and one warpgroup has nothing to do;
`empty[s]` the two warpgroups.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.backend import target_sms
from pallas_kernels.grouped_lora.pools import pools_of_a
from pallas_kernels.hopper import ring
from pallas_kernels.hopper.limits import BARRIER_BYTES, COMPUTE_WARPGROUPS, ROW_ALIGNMENT, SMEM_BYTES
from pallas_kernels.hopper.ring import DOWN
from pallas_kernels.lora_steps.api import LoRASteps, Shrunk
from pallas_kernels.lora_steps.entries import BEGIN, END, PAGE_A, PAGES_A_STEP, RANKS, SCALE
from pallas_kernels.pages import RANK_PAGE, LayerPages
from pallas_kernels.plan.tiles import Tiles

WIDTHS = (32, 96)  # rows of a window, where that is not a whole tile
MASKED_ROWS = 64  # of a window, that are masked at a time
ZERO_ROWS = 32  # of H, that are cleared at a time
MAX_SHARES = 8  # items that a tile's steps are shared out among


def shrink_adapters(
    x: Float[Array, "Q in"], adapters: LayerPages, tiles: Tiles, steps: LoRASteps, num_sms: int | None = None
) -> Shrunk:
    """`shrink` by the pools of one projection's adapters, or of two's.

    Args:
      x: `[Q, in]`, rows in sorted order.
      adapters: of one projection, or of two that share x.
      tiles: those that the steps were made for.
      steps: made of these adapters.
      num_sms: blocks; those of the target where None.
    """
    return Shrunk(steps, shrink(x, pools_of_a(adapters), tiles, steps, num_sms))


def shrink(
    x: Float[Array, "Q in"],
    pools: tuple[Float[Array, "_pages 16 in"], ...],
    tiles: Tiles,
    steps: LoRASteps,
    num_sms: int | None = None,
) -> Float[Array, "N rows 64"]:
    """H of every LoRA step: `scale * x[r] @ A.T` in each entry's own rows, zeros in the others that the tile has.

    Args:
      x: rows in sorted order.
      pools: the pool of A pages, or one for each of two projections (see `LoRASteps`).
      tiles: of the plan.
      steps: made of the adapters of these pools.
      num_sms: blocks; those of the target where None.

    Returns:
      `[N, tiles.size, 64]` in x's dtype; steps that are not in use, and rows that a tile does not have, may hold
      anything.
    """
    num_sms = num_sms or target_sms()
    width, tile_rows = x.shape[1], tiles.size
    depth = 256 if tile_rows <= 32 else 128  # elements of K a stage; past the width TMA reads zeros
    depth_steps = pl.cdiv(width, depth)
    widths = (*(rows for rows in WIDTHS if rows < tile_rows), tile_rows)
    stages = _stages(tile_rows, depth)
    # Tiles of few rows seldom have all the steps that they could: their shares would mostly be empty.
    shares = max(1, min(MAX_SHARES, steps.max_steps // (4 if tile_rows <= 32 else 2)))

    def shrink_rows(start_of, rows_of, count, first_of, steps_of, entries, x, pool0, pool1, out, **smem):
        page_ring, row_ring, out_tile, zeros, full, half_full, empty = (
            smem[name] for name in ("page_ring", "row_ring", "out_tile", "zeros", "full", "half_full", "empty")
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

        def rows_of_pair(tile, steps, index):
            """First row of a pair of steps in its tile, a multiple of 8, and the rows from there to its last."""
            first = 2 * index * PAGES_A_STEP
            last = jnp.minimum(2 * index + 1, steps - 1) * PAGES_A_STEP + (PAGES_A_STEP - 1)
            end = entries[END, tile, last]
            for q in range(1, 2 * PAGES_A_STEP):  # of entries that are not in use it is 0
                end = jnp.maximum(end, entries[END, tile, jnp.maximum(last - q, first)])
            begin = lax.div(entries[BEGIN, tile, first], jnp.int32(ROW_ALIGNMENT)) * ROW_ALIGNMENT
            return begin, end - begin

        def in_window(tile, steps, index, action):
            """`action(first row, width)`: the narrowest window of the tile that holds the rows of a pair of steps."""
            begin, used = rows_of_pair(tile, steps, index)

            def sized(width):
                action(pl.multiple_of(jnp.minimum(begin, tile_rows - width), ROW_ALIGNMENT), width)

            ring.as_wide_as(used, widths, sized)

        @pl.when(warpgroup == COMPUTE_WARPGROUPS)
        def _memory():
            ring.give_registers(COMPUTE_WARPGROUPS)

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

                    def copies(low, rows):
                        def copy(k, page_ids, barriers):
                            stage, some = ring.wait_until_empty(empty, done + k, stages), pl.ds(k * depth, depth)
                            for nth, page in enumerate(page_ids):
                                half, q = divmod(nth, PAGES_A_STEP)
                                target = page_ring.at[stage, half, pl.ds(q * RANK_PAGE, RANK_PAGE)]
                                copy_page(page, some, target, barriers.at[stage])
                            target = row_ring.at[stage, pl.ds(0, rows)]
                            plgpu.copy_gmem_to_smem(x.at[pl.ds(row + low, rows), some], target, barriers.at[stage])

                        pl.when(both)(lambda: pl.loop(0, depth_steps)(lambda k: copy(k, page_ids, full)))
                        pl.when(jnp.logical_not(both))(
                            lambda: pl.loop(0, depth_steps)(lambda k: copy(k, page_ids[:PAGES_A_STEP], half_full))
                        )

                    in_window(tile, steps, index, copies)
                    return done + depth_steps

                return lax.fori_loop(0, pairs, pair, done)

            ring.drain(empty, ring.over_items(count[0] * shares, num_sms, item), stages)

        @pl.when(warpgroup < COMPUTE_WARPGROUPS)
        def _compute():
            ring.take_registers(COMPUTE_WARPGROUPS)
            zeros.at[warpgroup][...] = jnp.zeros((ZERO_ROWS, RANKS), x.dtype)
            plgpu.commit_smem()

            def item(number, done):
                tile, steps, share, pairs = share_of(number)
                first = first_of[tile, 0]

                def pair(turn, done):
                    index = share + turn * shares
                    both = 2 * index + 1 < steps

                    def wait(stage):
                        pl.when(both)(lambda: plgpu.barrier_wait(full.at[stage]))
                        pl.when(jnp.logical_not(both))(lambda: plgpu.barrier_wait(half_full.at[stage]))

                    step = 2 * index + warpgroup

                    def of_ranks(field):
                        """`[64]`: of the entry that each of the step's ranks belongs to."""
                        rank = plgpu.broadcasted_iota(jnp.int32, (RANKS,), 0, layout=DOWN)
                        values = [entries[field, tile, step * PAGES_A_STEP + q] for q in range(PAGES_A_STEP)]
                        chosen = jnp.full(rank.shape, values[0])
                        for q in range(1, PAGES_A_STEP):
                            chosen = jnp.where(rank >= q * RANK_PAGE, values[q], chosen)
                        return chosen

                    def multiply(low, width):
                        def accumulate(acc):
                            @pl.loop(0, depth_steps)
                            def _(k):
                                stage = ring.stage_of(done + k, stages)
                                wait(stage)
                                rows = row_ring.at[stage, pl.ds(0, width)]
                                plgpu.wgmma(acc, page_ring.at[stage, warpgroup], rows.T)
                                plgpu.wgmma_wait(0)
                                plgpu.barrier_arrive(empty.at[stage])

                            return acc[...]

                        acc = pl.run_scoped(accumulate, plgpu.ACC((RANKS, width)))
                        begins, ends, scales = (of_ranks(field) for field in (BEGIN, END, SCALE))
                        scales = lax.bitcast_convert_type(scales, jnp.float32)
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        for begin in range(0, width, MASKED_ROWS):  # all at once would spill
                            some = acc[:, begin : begin + MASKED_ROWS]
                            rows = plgpu.broadcasted_iota(jnp.int32, some.shape, 1, layout=plgpu.Layout.WGMMA)
                            rows = rows + (low + begin)
                            wide = partial(lax.broadcast_in_dim, shape=some.shape, broadcast_dimensions=(0,))
                            mine = (rows >= wide(begins)) & (rows < wide(ends))
                            result = jnp.where(mine, some * wide(scales), 0.0).astype(out.dtype)
                            target = out_tile.at[warpgroup, pl.ds(begin, some.shape[1])].T
                            target[...] = plgpu.layout_cast(result, plgpu.Layout.WGMMA_TRANSPOSED)
                        plgpu.commit_smem()
                        hidden, own = out.at[first + step], out_tile.at[warpgroup, pl.ds(0, width)]
                        plgpu.copy_smem_to_gmem(own, hidden.at[pl.ds(low, width)])
                        clear(hidden, 0, low)
                        clear(hidden, low + width, jnp.maximum(rows_of[tile] - (low + width), 0))

                    def clear(hidden, begin, rows):
                        """Rows of the step's H beside the window."""
                        wholes, own = lax.div(rows, jnp.int32(ZERO_ROWS)), zeros.at[warpgroup]

                        @pl.loop(0, wholes)
                        def _(index):
                            target = hidden.at[pl.ds(begin + index * ZERO_ROWS, ZERO_ROWS)]
                            plgpu.copy_smem_to_gmem(own, target, commit_group=False)

                        cleared = wholes * ZERO_ROWS
                        ring.store_rows(own, hidden, begin + cleared, rows - cleared, pl.ds(0, RANKS))

                    def let_pass():
                        """No step for this warpgroup: it only keeps the ring going."""

                        @pl.loop(0, depth_steps)
                        def _(k):
                            stage = ring.stage_of(done + k, stages)
                            plgpu.barrier_wait(half_full.at[stage])
                            plgpu.barrier_arrive(empty.at[stage])

                    has_step = both | (warpgroup == 0)
                    pl.when(has_step)(lambda: in_window(tile, steps, index, multiply))
                    pl.when(jnp.logical_not(has_step))(let_pass)
                    return done + depth_steps

                return lax.fori_loop(0, pairs, pair, done)

            ring.over_items(count[0] * shares, num_sms, item)
            plgpu.wait_smem_to_gmem(0)

    dtype = x.dtype
    scratch = {
        "page_ring": ring.tile_smem((stages, COMPUTE_WARPGROUPS, RANKS, depth), dtype),
        "row_ring": ring.tile_smem((stages, tile_rows, depth), dtype),
        "out_tile": ring.row_smem((COMPUTE_WARPGROUPS, tile_rows, RANKS), dtype),
        "zeros": plgpu.SMEM((COMPUTE_WARPGROUPS, ZERO_ROWS, RANKS), dtype),
        "full": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS * PAGES_A_STEP + 1, num_barriers=stages),
        "half_full": plgpu.Barrier(num_arrivals=PAGES_A_STEP + 1, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
    }
    out_type = jax.ShapeDtypeStruct((steps.bound, tile_rows, RANKS), dtype)
    kernel = ring.run(shrink_rows, out_type, scratch, num_sms)
    return kernel(
        tiles.start,
        tiles.rows,
        tiles.count.reshape(-1),
        steps.first,
        steps.count,
        steps.entries,
        x,
        pools[0],
        pools[-1],
    )


def _stages(tile_rows: int, depth: int) -> int:
    stage = (COMPUTE_WARPGROUPS * RANKS + tile_rows) * depth * 2
    out = COMPUTE_WARPGROUPS * (tile_rows + ZERO_ROWS) * RANKS * 2
    return min(8, (SMEM_BYTES - BARRIER_BYTES - out) // stage)

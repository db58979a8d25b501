"""Grouped matmul on Hopper: wgmma and TMA, with the adapters' expand as more steps of K in the same accumulator.

A work item is one tile of rows (all of one expert) times one block of output columns. Each block of threads walks its
share of the items; its memory warpgroup streams stages of 64 elements of K through a ring in shared memory, two compute
warpgroups (or one, where few items would leave SMs idle) multiply them. A stage holds two parts of the weights, 64 rows
a warpgroup each, and the tile's rows: part 0 and 1 are gate and up of the same columns (gated), or two runs of columns
of one weight (plain). After K come the LoRA steps: four pages of B in place of the weights, and the step's H (see
`steps.py`) in place of the rows.

    stream form: a warpgroup's accumulators are [64 weight rows, tile rows]: any number of rows a tile, for few rows
    tensor form: a warpgroup's accumulators are [64 tile rows, 128 weight rows]: for many rows

`full[s]` counts the TMA copies of a step of K into stage s, `pages_full[s]` those of a LoRA step; `empty[s]` counts the
compute warpgroups that are done with it. They let go of a stage one step late, so that the tensor cores always have the
next step queued.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import mosaic
from pallas_kernels.entries import PAGE_B0, PAGE_B1, PAGES_A_STEP
from pallas_kernels.grouped_lora.pages import RANK_PAGE
from pallas_kernels.mosaic import DEPTH, HALF, ROW_ALIGNMENT
from pallas_kernels.plan import Tiles
from pallas_kernels.steps import LoRASteps
from pallas_kernels.tuning import Config

PAGE_COPIES = 2 * PAGES_A_STEP  # of a LoRA step


def grouped_matmul(
    x: Float[Array, "Q in"],
    weights: tuple[Float[Array, "E _out _in"], ...],
    tiles: Tiles,
    config: Config,
    activation: Callable[[Array], Array] | None = None,
    steps: LoRASteps | None = None,
    hidden: Float[Array, "N rows 64"] | None = None,
    pages: tuple[Float[Array, "pages 16 out"], ...] = (),
    transposed: bool = False,
) -> Float[Array, "Q out"]:
    """`x[r] @ W[e].T`, or `activation(x[r] @ W0[e].T) * (x[r] @ W1[e].T)`, for the rows of each tile.

    Args:
      x: rows in sorted order. weights: one matrix an expert, or two (gated). tiles: of at most `config.tile_rows` rows.
      steps, hidden, pages: the adapters' expand: what each LoRA step holds, its H, and the pools of B pages, one for
        each weight.
      transposed: one weight `[E, in, out]`, `x[r] @ W[e]`. A stage then holds 64 rows of it as it holds 64 ranks of B.

    Returns:
      `[Q, out]` in x's dtype; rows that no tile covers are not written.
    """
    rows, width = x.shape
    gated = len(weights) == 2
    out_width = weights[0].shape[2 if transposed else 1]
    warpgroups = config.warpgroups
    part_rows = HALF * warpgroups
    columns = part_rows if gated else 2 * part_rows
    blocks = pl.cdiv(out_width, columns)
    depth_steps = width // DEPTH
    stages, tile_rows, num_sms = config.stages, config.tile_rows, config.num_sms
    stream = config.form == "stream"
    with_lora = steps is not None

    def body(expert_of, start_of, rows_of, count, first_of, steps_of, entries, x, w0, w1, hidden, b0, b1, out, **smem):
        (weight_ring, page_ring), row_ring = smem["ring"], smem["row_ring"]
        out_tile, full, pages_full, empty = (smem[name] for name in ("out_tile", "full", "pages_full", "empty"))
        warpgroup = lax.axis_index("wg")
        items = count[0] * blocks

        def place(number):
            """Tile and first columns of an item; consecutive items share a tile, so its rows come from L2."""
            tile, block = lax.div(number, jnp.int32(blocks)), lax.rem(number, jnp.int32(blocks))
            return tile, block * columns, steps_of[tile, 0] if with_lora else 0

        def column(first, part):
            return first + (0 if gated else part * part_rows)

        @pl.when(warpgroup == warpgroups)
        def _memory():
            mosaic.give_registers(warpgroups)

            def item(number, done):
                tile, first, lora_steps = place(number)
                expert, row = expert_of[tile], pl.multiple_of(start_of[tile], ROW_ALIGNMENT)

                @pl.loop(0, depth_steps)
                def _(k):
                    stage = mosaic.wait_until_empty(empty, done + k, stages)
                    depth = pl.ds(k * DEPTH, DEPTH)
                    for part, weight in enumerate((w0, w1)):
                        some = pl.ds(column(first, part), part_rows)
                        if transposed:
                            source, target = weight.at[expert, depth, some], page_ring.at[stage, part]
                        else:
                            source = weight.at[expert, some, depth]
                            target = weight_ring.at[stage, pl.ds(part * part_rows, part_rows)]
                        plgpu.copy_gmem_to_smem(source, target, full.at[stage])
                    plgpu.copy_gmem_to_smem(x.at[pl.ds(row, tile_rows), depth], row_ring.at[stage], full.at[stage])

                if with_lora:
                    first_step = first_of[tile, 0]

                    @pl.loop(0, lora_steps)
                    def _(k):
                        # Read before the wait, which hides what the reads take.
                        page_ids = [
                            [entries[side, tile, k * PAGES_A_STEP + q] for q in range(PAGES_A_STEP)]
                            for side in (PAGE_B0, PAGE_B1)
                        ]
                        stage = mosaic.wait_until_empty(empty, done + depth_steps + k, stages)
                        for part, pool in enumerate((b0, b1)):
                            for q, page in enumerate(page_ids[part]):
                                plgpu.copy_gmem_to_smem(
                                    pool.at[page, :, pl.ds(column(first, part), part_rows)],
                                    page_ring.at[stage, part, pl.ds(q * RANK_PAGE, RANK_PAGE)],
                                    pages_full.at[stage],
                                )
                        plgpu.copy_gmem_to_smem(hidden.at[first_step + k], row_ring.at[stage], pages_full.at[stage])

                return done + depth_steps + lora_steps

            steps_done = mosaic.over_items(items, num_sms, item)
            mosaic.drain(empty, steps_done, stages)

        @pl.when(warpgroup < warpgroups)
        def _compute():
            mosaic.take_registers(warpgroups)
            own = pl.ds(warpgroup * HALF, HALF)

            def multiply_and_store(tile, first, lora_steps, done):
                def accumulate(*accs):
                    def multiply(step, ready, products):
                        stage = mosaic.stage_of(step, stages)
                        plgpu.barrier_wait(ready.at[stage])
                        for product in products(stage):
                            plgpu.wgmma(*product)
                        plgpu.wgmma_wait(len(accs))  # this step is under way, the last one is done

                        @pl.when(step > done)
                        def _():
                            plgpu.barrier_arrive(empty.at[mosaic.stage_of(step - 1, stages)])

                    def products(stage, operand):
                        """`operand(part)`: this stage's 64 of K by this warpgroup's rows of that part's weights."""
                        rows = row_ring.at[stage]
                        for part, acc in enumerate(accs):
                            yield (acc, operand(part).T, rows.T) if stream else (acc, rows.at[own], operand(part))

                    def depth_products(stage):
                        begin, count = (warpgroup * HALF, HALF) if stream else (0, part_rows)
                        yield from products(
                            stage, lambda part: weight_ring.at[stage, pl.ds(part * part_rows + begin, count)].T
                        )

                    def lora_products(stage):
                        some = own if stream else slice(None)
                        yield from products(stage, lambda part: page_ring.at[stage, part, :, some])

                    @pl.loop(0, depth_steps)
                    def _(k):
                        multiply(done + k, full, lora_products if transposed else depth_products)

                    if with_lora:

                        @pl.loop(0, lora_steps)
                        def _(k):
                            multiply(done + depth_steps + k, pages_full, lora_products)

                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(empty.at[mosaic.stage_of(done + depth_steps + lora_steps - 1, stages)])
                    return tuple(acc[...] for acc in accs)

                shape = (HALF, tile_rows) if stream else (HALF, part_rows)
                part0, part1 = pl.run_scoped(accumulate, *[plgpu.ACC(shape)] * 2)
                results = (activation(part0) * part1,) if gated else (part0, part1)
                row, used = start_of[tile], rows_of[tile]
                if stream:
                    for part, result in enumerate(results):
                        mine = out_tile.at[warpgroup]
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        mine.T[...] = plgpu.layout_cast(result.astype(out.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                        plgpu.commit_smem()
                        begin = column(first, part) + warpgroup * HALF
                        mosaic.store_rows(mine, out, row, used, pl.ds(begin, HALF))
                else:
                    used = jnp.clip(used - warpgroup * HALF, 0, HALF)
                    for part, result in enumerate(results):
                        for half in range(2):
                            mine = out_tile.at[warpgroup, half]
                            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                            mine[...] = result[:, half * DEPTH : (half + 1) * DEPTH].astype(out.dtype)
                            plgpu.commit_smem()
                            begin = column(first, part) + half * DEPTH
                            mosaic.store_rows(mine, out, row + warpgroup * HALF, used, pl.ds(begin, DEPTH))

            def let_pass(lora_steps, done):
                """This warpgroup has no rows in the tile: it only keeps the ring going."""

                @pl.loop(0, depth_steps)
                def _(k):
                    stage = mosaic.stage_of(done + k, stages)
                    plgpu.barrier_wait(full.at[stage])
                    plgpu.barrier_arrive(empty.at[stage])

                if with_lora:

                    @pl.loop(0, lora_steps)
                    def _(k):
                        stage = mosaic.stage_of(done + depth_steps + k, stages)
                        plgpu.barrier_wait(pages_full.at[stage])
                        plgpu.barrier_arrive(empty.at[stage])

            def item(number, done):
                tile, first, lora_steps = place(number)
                if stream:
                    multiply_and_store(tile, first, lora_steps, done)
                else:
                    has_rows = rows_of[tile] > warpgroup * HALF
                    pl.when(has_rows)(lambda: multiply_and_store(tile, first, lora_steps, done))
                    pl.when(jnp.logical_not(has_rows))(lambda: let_pass(lora_steps, done))
                return done + depth_steps + lora_steps

            mosaic.over_items(items, num_sms, item)
            plgpu.wait_smem_to_gmem(0)

    dtype = x.dtype
    weight_ring = mosaic.tile_smem((stages, 2 * part_rows, DEPTH), dtype)
    page_ring = mosaic.tile_smem(
        (stages, 2, PAGES_A_STEP * RANK_PAGE, part_rows), dtype
    )  # a stage takes the same bytes
    scratch = {
        "ring": (weight_ring, page_ring) if config.apart else plgpu.RefUnion(weight_ring, page_ring),
        "row_ring": mosaic.tile_smem((stages, tile_rows, DEPTH), dtype),
        "out_tile": mosaic.row_smem((warpgroups, tile_rows, HALF) if stream else (warpgroups, 2, HALF, DEPTH), dtype),
        "full": plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        "pages_full": plgpu.Barrier(num_arrivals=PAGE_COPIES + 1, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    }
    if steps is None:  # never read: arrays that are there already, for no kernel to make others
        lists, hidden, pages = (tiles.start,) * 3, x, (x,)
    else:
        lists = (steps.first, steps.count, steps.entries)
    # What profilers show.
    body.__name__ = f"{'gated_' if gated else ''}{'transposed_' if transposed else ''}matmul_{config.form}"
    kernel = mosaic.run(body, jax.ShapeDtypeStruct((rows, out_width), dtype), scratch, num_sms, warpgroups)
    return kernel(
        tiles.expert, tiles.start, tiles.rows, tiles.count.reshape(-1), *lists,
        x, weights[0], weights[-1], hidden, pages[0], pages[-1],
    )  # fmt: skip

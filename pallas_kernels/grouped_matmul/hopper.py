"""Grouped matmul on Hopper: wgmma and TMA, with the adapters' expand as more steps of K in the same accumulator.

A work item is one tile of rows (all of one expert) times one block of output columns. Each block of threads walks its
share of the items; its memory warpgroup streams stages of 64 elements of K through a ring in shared memory, two compute
warpgroups multiply them. A stage holds two 128-row parts of the weights and the tile's rows: part 0 and 1 are gate and
up of the same 128 columns (gated), or two runs of 128 columns of one weight (plain). After K come the LoRA steps: four
pages of B in place of the weights, and the step's H (see `steps.py`) in place of the rows.

    stream form: a warpgroup's accumulators are [64 weight rows, tile rows]: any number of rows a tile, for few rows
    tensor form: a warpgroup's accumulators are [64 tile rows, 128 weight rows]: for many rows

`full[s]` counts the TMA copies into stage s (nine, whichever step it is); `empty[s]` the compute warpgroups that are
done with it. A stage is let go of one step late, so that the tensor cores always have the next step queued.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import mosaic
from pallas_kernels.mosaic import COMPUTE_WARPGROUPS, DEPTH, PART, ROW_ALIGNMENT
from pallas_kernels.plan import Tiles
from pallas_kernels.steps import PAGES_A_STEP, LoRASteps

HALF = PART // COMPUTE_WARPGROUPS
WEIGHT_COPIES = 4  # copies a part, so that a step of K arrives as often as a LoRA step


@dataclass(frozen=True)
class Config:
    """How one call is cut.

    Attributes:
      form: see the module. tile_rows: rows a tile, a multiple of 8; 128 in the tensor form. stages: of the ring.
      num_sms: blocks. apart: weights and pages have a ring each; for the interpreter, whose race detector takes two
        views of one ring for the same memory, whatever the stage.
    """

    form: Literal["stream", "tensor"]
    tile_rows: int
    stages: int
    num_sms: int = 132
    apart: bool = False


def smem_bytes(config: Config) -> int:
    """Shared memory that a block takes, barriers aside."""
    stage = (2 * PART + config.tile_rows) * DEPTH * 2
    out = COMPUTE_WARPGROUPS * (config.tile_rows * HALF if config.form == "stream" else 2 * HALF * DEPTH) * 2
    return config.stages * stage + out


def grouped_matmul(
    x: Float[Array, "P in"],
    weights: tuple[Float[Array, "E out in"], ...],
    tiles: Tiles,
    config: Config,
    activation: Callable[[Array], Array] | None = None,
    steps: LoRASteps | None = None,
    hidden: Float[Array, "N rows 64"] | None = None,
    pages: tuple[Float[Array, "pages 16 out"], ...] = (),
) -> Float[Array, "P out"]:
    """`x[r] @ W[e].T`, or `activation(x[r] @ W0[e].T) * (x[r] @ W1[e].T)`, for the rows of each tile.

    Args:
      x: rows in sorted order. weights: one matrix an expert, or two (gated). tiles: of at most `config.tile_rows` rows.
      steps, hidden, pages: the adapters' expand: what each LoRA step holds, its H, and the pools of B pages, one for
        each weight.

    Returns:
      `[P, out]` in x's dtype; rows that no tile covers are not written.
    """
    rows, width = x.shape
    gated = len(weights) == 2
    out_width = weights[0].shape[1]
    columns = PART if gated else 2 * PART
    blocks = pl.cdiv(out_width, columns)
    depth_steps = width // DEPTH
    stages, tile_rows, num_sms = config.stages, config.tile_rows, config.num_sms
    stream = config.form == "stream"
    with_lora = steps is not None

    def body(expert_of, start_of, rows_of, count, step_of, page0_of, page1_of, x, w0, w1, hidden, b0, b1, out, **smem):
        (weight_ring, page_ring), row_ring = smem["ring"], smem["row_ring"]
        out_tile, full, empty = smem["out_tile"], smem["full"], smem["empty"]
        warpgroup = lax.axis_index("wg")
        items = count[0] * blocks

        def place(number):
            """Tile and first columns of an item; consecutive items share a tile, so its rows come from L2."""
            tile, block = lax.div(number, jnp.int32(blocks)), lax.rem(number, jnp.int32(blocks))
            first_step = step_of[tile] if with_lora else 0
            lora_steps = step_of[tile + 1] - first_step if with_lora else 0
            return tile, block * columns, first_step, lora_steps

        def column(first, part):
            return first + (0 if gated else part * PART)

        @pl.when(warpgroup == COMPUTE_WARPGROUPS)
        def _memory():
            plgpu.set_max_registers(mosaic.MEMORY_REGISTERS, action="decrease")

            def item(number, done):
                tile, first, first_step, lora_steps = place(number)
                expert, row = expert_of[tile], pl.multiple_of(start_of[tile], ROW_ALIGNMENT)

                @pl.loop(0, depth_steps)
                def _(k):
                    stage = mosaic.wait_until_empty(empty, done + k, stages)
                    depth = pl.ds(k * DEPTH, DEPTH)
                    some = PART // WEIGHT_COPIES
                    for part, weight in enumerate((w0, w1)):
                        for copy in range(WEIGHT_COPIES):
                            plgpu.copy_gmem_to_smem(
                                weight.at[expert, pl.ds(column(first, part) + copy * some, some), depth],
                                weight_ring.at[stage, part, pl.ds(copy * some, some)],
                                full.at[stage],
                            )
                    plgpu.copy_gmem_to_smem(x.at[pl.ds(row, tile_rows), depth], row_ring.at[stage], full.at[stage])

                if with_lora:

                    @pl.loop(0, lora_steps)
                    def _(k):
                        stage = mosaic.wait_until_empty(empty, done + depth_steps + k, stages)
                        step = first_step + k
                        for part, (pool, page_of) in enumerate(((b0, page0_of), (b1, page1_of))):
                            for q in range(PAGES_A_STEP):
                                plgpu.copy_gmem_to_smem(
                                    pool.at[page_of[step * PAGES_A_STEP + q], :, pl.ds(column(first, part), PART)],
                                    page_ring.at[stage, part, pl.ds(q * 16, 16)],
                                    full.at[stage],
                                )
                        plgpu.copy_gmem_to_smem(hidden.at[step], row_ring.at[stage], full.at[stage])

                return done + depth_steps + lora_steps

            steps_done = mosaic.over_items(items, num_sms, item)
            mosaic.drain(empty, steps_done, stages)

        @pl.when(warpgroup < COMPUTE_WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(mosaic.COMPUTE_REGISTERS, action="increase")
            own = pl.ds(warpgroup * HALF, HALF)

            def item(number, done):
                tile, first, _, lora_steps = place(number)

                def accumulate(acc0, acc1):
                    def multiply(step, operands):
                        stage = mosaic.stage_of(step, stages)
                        plgpu.barrier_wait(full.at[stage])
                        for part, acc in enumerate((acc0, acc1)):
                            plgpu.wgmma(acc, *operands(stage, part))
                        plgpu.wgmma_wait(2)  # this step's two are under way, the last step's are done

                        @pl.when(step > done)
                        def _():
                            plgpu.barrier_arrive(empty.at[mosaic.stage_of(step - 1, stages)])

                    def depth_operands(stage, part):
                        if stream:
                            return weight_ring.at[stage, part, own], row_ring.at[stage].T
                        return row_ring.at[stage, own], weight_ring.at[stage, part].T

                    def lora_operands(stage, part):
                        if stream:
                            return page_ring.at[stage, part, :, own].T, row_ring.at[stage].T
                        return row_ring.at[stage, own], page_ring.at[stage, part]

                    @pl.loop(0, depth_steps)
                    def _(k):
                        multiply(done + k, depth_operands)

                    if with_lora:

                        @pl.loop(0, lora_steps)
                        def _(k):
                            multiply(done + depth_steps + k, lora_operands)

                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(empty.at[mosaic.stage_of(done + depth_steps + lora_steps - 1, stages)])
                    return acc0[...], acc1[...]

                shape = (HALF, tile_rows) if stream else (HALF, PART)
                acc0, acc1 = pl.run_scoped(accumulate, plgpu.ACC(shape), plgpu.ACC(shape))
                results = (activation(acc0) * acc1,) if gated else (acc0, acc1)
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
                return done + depth_steps + lora_steps

            mosaic.over_items(items, num_sms, item)
            plgpu.wait_smem_to_gmem(0)

    dtype = x.dtype
    weight_ring = mosaic.tile_smem((stages, 2, PART, DEPTH), dtype)
    page_ring = mosaic.tile_smem((stages, 2, PAGES_A_STEP * 16, PART), dtype)  # a stage takes the same bytes
    scratch = {
        "ring": (weight_ring, page_ring) if config.apart else plgpu.RefUnion(weight_ring, page_ring),
        "row_ring": mosaic.tile_smem((stages, tile_rows, DEPTH), dtype),
        "out_tile": mosaic.row_smem(
            (COMPUTE_WARPGROUPS, tile_rows, HALF) if stream else (COMPUTE_WARPGROUPS, 2, HALF, DEPTH), dtype
        ),
        "full": plgpu.Barrier(num_arrivals=2 * WEIGHT_COPIES + 1, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
    }
    none = jnp.zeros(1, jnp.int32)
    lora = (steps.start, steps.pages_b[0], steps.pages_b[-1]) if steps is not None else (none, none, none)
    if not with_lora:
        hidden, pages = jnp.zeros((1, tile_rows, DEPTH), dtype), (jnp.zeros((1, 16, PART), dtype),)
    kernel = mosaic.run(body, jax.ShapeDtypeStruct((rows, out_width), dtype), scratch, num_sms)
    return kernel(
        tiles.expert, tiles.start, tiles.rows, tiles.count[None], *lora,
        x, weights[0], weights[-1], hidden, pages[0], pages[-1],
    )  # fmt: skip

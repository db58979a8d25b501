"""Grouped matmul on Hopper: wgmma and TMA, with the adapters' expand as more steps of K in the same accumulator.

A work item is one tile of rows (all of one expert) times one block of output columns. Each block of threads walks its
share of the items; its memory warpgroup streams stages of 64 elements of K through a ring in shared memory, two compute
warpgroups (or one, where few items would leave SMs idle) multiply them. A stage holds two parts of the weights, 64 rows
a warpgroup each, and the tile's rows: part 0 and 1 are gate and up of the same columns (gated), or two runs of columns
of one weight (plain). After K come the LoRA steps: four pages of B in place of the weights, and the step's H (see
`lora_steps/api.py`) in place of the rows.

Weights are on wgmma's M side and the tile's rows on its N side: a warpgroup's accumulators are [64 weight rows, rows].
N may be any multiple of 8, so a tile can be all rows of an expert, however few. A kernel has code for a few widths
(`HopperConfig.widths`); a tile is multiplied by the narrowest one that holds its rows.

`full[s]` counts the TMA copies of a step of K into stage s, `pages_full[s]` those of a LoRA step; `empty[s]` counts the
compute warpgroups that are done with it. They let go of a stage one step late, so that the tensor cores always have the
next step queued.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.hopper import ring
from pallas_kernels.hopper.limits import DEPTH, HALF, ROW_ALIGNMENT
from pallas_kernels.hopper.ring import DOWN
from pallas_kernels.hopper.tuning import HopperConfig
from pallas_kernels.lora_steps.api import LoRASteps
from pallas_kernels.lora_steps.entries import PAGE_B0, PAGE_B1, PAGES_A_STEP
from pallas_kernels.pages import RANK_PAGE
from pallas_kernels.plan.tiles import Tiles
from pallas_kernels.quantised.array import Quantised

PAGE_COPIES = 2 * PAGES_A_STEP  # of a LoRA step
STORED_ROWS = 64  # of a tile, at a time, where factors are kept


class MatmulOperands(NamedTuple):
    """What one of the products that a tile sums is made of.

    Attributes:
      x: rows in sorted order.
      weights: one matrix per expert, or two (gated); packed ones for `hopper_quantised_kernel.py`.
      steps: what each LoRA step of the adapters' expand holds; None without adapters.
      hidden: H of each step; None without adapters.
      pages: the pools of B pages, one for each weight; empty without adapters.
    """

    x: Float[Array, "Q _in"]
    weights: tuple[Float[Array, "E _out _in"] | Quantised, ...]
    steps: LoRASteps | None = None
    hidden: Float[Array, "N rows 64"] | None = None
    pages: tuple[Float[Array, "_pages 16 _out"], ...] = ()

    @property
    def depth_steps(self) -> int:
        return self.x.shape[1] // DEPTH

    def operands(self, unused: Array) -> tuple[Array, ...]:
        """As the kernel takes them; what is never read is an array that is there already."""
        if self.steps is None:
            return (unused,) * 3 + (self.x, self.weights[0], self.weights[-1]) + (self.x,) * 3  # type: ignore[return-value]
        lists = self.steps.first, self.steps.count, self.steps.entries
        ends = self.pages[0], self.pages[-1]
        return *lists, self.x, self.weights[0], self.weights[-1], self.hidden, *ends  # type: ignore[return-value]


OPERANDS = 9  # of a source


def grouped_matmul(
    sources: tuple[MatmulOperands, ...],
    tiles: Tiles,
    config: HopperConfig,
    unit: Callable[[Array, Array], Array] | None = None,
    biases: tuple[Float[Array, "E _out"] | None, ...] = (None, None),
    *,
    transposed: bool = False,
    keep: bool = False,
    num_rows: int | None = None,
) -> tuple[Float[Array, "Q out"], ...]:
    """`x[r] @ W[e].T + b[e]`, or `unit` of two such products (gated), for the rows of each tile.

    Args:
      sources: one; transposed, one or two, whose products are summed.
      tiles: of at most `config.tile_rows` rows.
      config: how the call is cut.
      unit: the gated unit of two products; None for one product.
      biases: for each weight its bias, or None.
      transposed: one weight a source, `[E, in, out]`, `x[r] @ W[e]`. A stage then holds 64 rows of it as it holds 64
        ranks of B.
      keep: of a gated product both factors are results too.
      num_rows: Q, where x is the rows of one tile, which all tiles read; None where it is sorted rows.

    Returns:
      `[Q, out]` in x's dtype; rows that no tile covers are not written. With `keep` two more, the factors.
    """
    rows = num_rows or sources[0].x.shape[0]
    gated = len(sources[0].weights) == 2
    out_width = sources[0].weights[0].shape[2 if transposed else 1]
    warpgroups = config.warpgroups
    part_rows = HALF * warpgroups
    columns = part_rows if gated else 2 * part_rows
    blocks = pl.cdiv(out_width, columns)
    depth_steps = sum(source.depth_steps for source in sources)
    stages, tile_rows, num_sms = config.stages, config.tile_rows, config.num_sms
    widths = *config.widths, tile_rows
    given = [index for index, bias in enumerate(biases) if bias is not None]
    num_outs = 3 if keep else 1

    def body(expert_of, start_of, rows_of, count, *refs, **smem):
        of_sources, refs = refs[: OPERANDS * len(sources)], refs[OPERANDS * len(sources) :]
        refs_of = [of_sources[OPERANDS * index :][:OPERANDS] for index in range(len(sources))]
        with_lora = [(source, own) for source, own in zip(sources, refs_of, strict=True) if source.steps is not None]
        bias_of, outs = dict(zip(given, refs, strict=False)), refs[-num_outs:]
        (weight_ring, page_ring), row_ring = smem["ring"], smem["row_ring"]
        out_tile, full, pages_full, empty = (smem[name] for name in ("out_tile", "full", "pages_full", "empty"))
        warpgroup = lax.axis_index("wg")
        items = count[0] * blocks

        def place(number):
            """Tile and first columns of an item; consecutive items share a tile, so its rows come from L2."""
            tile, block = lax.div(number, jnp.int32(blocks)), lax.rem(number, jnp.int32(blocks))
            return tile, block * columns, [steps_of[tile, 0] for _, (_, steps_of, *_) in with_lora]

        def column(first, part):
            return first + (0 if gated else part * part_rows)

        @pl.when(warpgroup == warpgroups)
        def _memory():
            ring.give_registers(warpgroups)

            def copy_rows(used, origin, stage, barrier):
                """`origin(count)`, of as many rows as a tile of `used` rows is multiplied as."""

                def sized(count):
                    plgpu.copy_gmem_to_smem(origin(count), row_ring.at[stage, pl.ds(0, count)], barrier.at[stage])

                ring.as_wide_as(used, widths, sized)

            def item(number, done):
                tile, first, lora_steps = place(number)
                expert, used = expert_of[tile], rows_of[tile]
                # Not the constant 0, by which a slice may not be longer than x, and x may have fewer rows than a tile.
                row = pl.multiple_of(start_of[tile] if num_rows is None else used * 0, ROW_ALIGNMENT)

                for source, (*_, x, w0, w1, _, _, _) in zip(sources, refs_of, strict=True):

                    @pl.loop(0, source.depth_steps)
                    def _(k, done=done, x=x, weights=(w0, w1)):
                        stage = ring.wait_until_empty(empty, done + k, stages)
                        depth = pl.ds(k * DEPTH, DEPTH)
                        for part, weight in enumerate(weights):
                            some = pl.ds(column(first, part), part_rows)
                            if transposed:
                                origin, target = weight.at[expert, depth, some], page_ring.at[stage, part]
                            else:
                                origin = weight.at[expert, some, depth]
                                target = weight_ring.at[stage, pl.ds(part * part_rows, part_rows)]
                            plgpu.copy_gmem_to_smem(origin, target, full.at[stage])
                        copy_rows(used, lambda count: x.at[pl.ds(row, count), depth], stage, full)

                    done = done + source.depth_steps

                for (_, own), own_steps in zip(with_lora, lora_steps, strict=True):
                    first_of, _, entries, _, _, _, hidden, *pools = own

                    @pl.loop(0, own_steps)
                    def _(k, done=done, first_step=first_of[tile, 0], entries=entries, hidden=hidden, pools=pools):
                        # Read before the wait, which hides what the reads take.
                        page_ids = [
                            [entries[side, tile, k * PAGES_A_STEP + q] for q in range(PAGES_A_STEP)]
                            for side in (PAGE_B0, PAGE_B1)
                        ]
                        stage = ring.wait_until_empty(empty, done + k, stages)
                        for part, pool in enumerate(pools):
                            for q, page in enumerate(page_ids[part]):
                                plgpu.copy_gmem_to_smem(
                                    pool.at[page, :, pl.ds(column(first, part), part_rows)],
                                    page_ring.at[stage, part, pl.ds(q * RANK_PAGE, RANK_PAGE)],
                                    pages_full.at[stage],
                                )
                        own_hidden = hidden.at[first_step + k]
                        copy_rows(used, lambda count: own_hidden.at[pl.ds(0, count)], stage, pages_full)

                    done = done + own_steps

                return done

            steps_done = ring.over_items(items, num_sms, item)
            ring.drain(empty, steps_done, stages)

        @pl.when(warpgroup < warpgroups)
        def _compute():
            ring.take_registers(warpgroups)

            def multiply_and_store(tile, first, lora_steps, done, count):
                def accumulate(*accs):
                    def multiply(step, ready, products):
                        stage = ring.stage_of(step, stages)
                        plgpu.barrier_wait(ready.at[stage])
                        for product in products(stage):
                            plgpu.wgmma(*product)
                        plgpu.wgmma_wait(len(accs))  # this step is under way, the last one is done

                        @pl.when(step > done)
                        def _():
                            plgpu.barrier_arrive(empty.at[ring.stage_of(step - 1, stages)])

                    def products(stage, operand):
                        """`operand(part)`: this warpgroup's 64 rows of that part's weights, by this stage's 64 of K."""
                        rows = row_ring.at[stage, pl.ds(0, count)]
                        return [(acc, operand(part), rows.T) for part, acc in enumerate(accs)]

                    def depth_products(stage):
                        own = [pl.ds(part * part_rows + warpgroup * HALF, HALF) for part in range(2)]
                        return products(stage, lambda part: weight_ring.at[stage, own[part]])

                    def lora_products(stage):
                        own = pl.ds(warpgroup * HALF, HALF)
                        return products(stage, lambda part: page_ring.at[stage, part, :, own].T)

                    @pl.loop(0, depth_steps)
                    def _(k):
                        multiply(done + k, full, lora_products if transposed else depth_products)

                    last = done + depth_steps
                    for own_steps in lora_steps:

                        @pl.loop(0, own_steps)
                        def _(k, last=last):
                            multiply(last + k, pages_full, lora_products)

                        last = last + own_steps

                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(empty.at[ring.stage_of(last - 1, stages)])
                    return tuple(acc[...] for acc in accs)

                parts = pl.run_scoped(accumulate, *[plgpu.ACC((HALF, count))] * 2)
                store(parts, expert_of[tile], start_of[tile], rows_of[tile], first + warpgroup * HALF)

            def store(parts, expert, row, used, first):
                """`first`: of this warpgroup's columns."""
                begins = [column(first, part) for part in range(2)]

                def biased(part, some):
                    own, value = part if gated else 0, parts[part][:, some]
                    if own not in bias_of:
                        return value
                    # Widths are multiples of 64, so that these are all inside or all outside.
                    columns = pl.ds(jnp.minimum(begins[part], out_width - HALF), HALF)
                    vector = plgpu.load(bias_of[own].at[expert, columns], layout=DOWN, optimized=False)
                    return value + lax.broadcast_in_dim(vector.astype(jnp.float32), value.shape, (0,))

                def result(number, some):
                    if not gated:
                        return biased(number, some)
                    return biased(number - 1, some) if number else unit(biased(0, some), biased(1, some))

                rows = parts[0].shape[1]
                # The gated product beside both factors would not fit into registers: it comes last, and in parts.
                together = STORED_ROWS if keep else rows
                mine = out_tile.at[warpgroup]
                for number in reversed(range(num_outs if gated else 2)):
                    out, begin = (outs[number], first) if gated else (outs[0], begins[number])
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    for low in range(0, rows, together):
                        value = result(number, slice(low, low + together)).astype(out.dtype)
                        target = mine.at[pl.ds(low, value.shape[1])].T
                        target[...] = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
                    plgpu.commit_smem()
                    ring.store_rows(mine, out, row, used, pl.ds(begin, HALF))

            def item(number, done):
                tile, first, lora_steps = place(number)
                multiply = partial(multiply_and_store, tile, first, lora_steps, done)
                ring.as_wide_as(rows_of[tile], widths, multiply)
                return done + depth_steps + sum(lora_steps)

            ring.over_items(items, num_sms, item)
            plgpu.wait_smem_to_gmem(0)

    dtype = sources[0].x.dtype
    weight_ring = ring.tile_smem((stages, 2 * part_rows, DEPTH), dtype)
    page_ring = ring.tile_smem((stages, 2, PAGES_A_STEP * RANK_PAGE, part_rows), dtype)  # as many bytes a stage
    scratch = {
        "ring": (weight_ring, page_ring) if config.apart else plgpu.RefUnion(weight_ring, page_ring),
        "row_ring": ring.tile_smem((stages, tile_rows, DEPTH), dtype),
        "out_tile": ring.row_smem((warpgroups, tile_rows, HALF), dtype),
        "full": plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        "pages_full": plgpu.Barrier(num_arrivals=PAGE_COPIES + 1, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    }
    # What profilers show.
    kind = f"{'gated_' if gated else ''}{'transposed_' if transposed else ''}"
    body.__name__ = f"{kind}matmul{'_keep' if keep else ''}"
    out_type = [jax.ShapeDtypeStruct((rows, out_width), dtype)] * num_outs
    kernel = ring.run(body, out_type, scratch, num_sms, warpgroups)
    operands = [array for source in sources for array in source.operands(tiles.start)]
    own_biases = [bias for bias in biases if bias is not None]
    return tuple(kernel(tiles.expert, tiles.start, tiles.rows, tiles.count.reshape(-1), *operands, *own_biases))

"""Grouped matmul on Hopper over quantised weights: as `hopper_kernel.py`, but unpacked on the way to the tensor cores.

The memory warpgroup streams packed units (`quantised/packing.py`) and the tile's rows; a compute warpgroup takes the
words of its 64 rows of weights into registers, makes bfloat16 of them, and multiplies. Four-bit values carry their
scales. fp8's are left out there and factors of the sums: one per row, once, or one per 128 x 128 block, of a product of
128 columns that is then added. LoRA steps come after K, in 16 bits, through a ring of their own: a stage of pages has
another size than one of packed units.

wgmma reads registers, so a stage's products are waited for before the next ones; the other warpgroup multiplies
meanwhile.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.grouped_matmul.hopper_kernel import PAGE_COPIES, MatmulOperands
from pallas_kernels.hopper import ring
from pallas_kernels.hopper.limits import HALF, ROW_ALIGNMENT
from pallas_kernels.hopper.quantised_tuning import PAGE_STAGES, PARTS, QuantisedConfig
from pallas_kernels.hopper.ring import DOWN
from pallas_kernels.lora_steps.entries import PAGE_B0, PAGE_B1, PAGES_A_STEP
from pallas_kernels.pages import RANK_PAGE
from pallas_kernels.plan.tiles import Tiles
from pallas_kernels.quantised.api import dequantise
from pallas_kernels.quantised.array import Quantised
from pallas_kernels.quantised.format import UNIT, Format
from pallas_kernels.quantised.fp8 import numbers_of
from pallas_kernels.quantised.hopper_registers import unpacked
from pallas_kernels.quantised.packing import unit_shape, unpack

IN_FLIGHT = 4  # units whose registers the tensor cores may be reading at once
BLOCK_UNITS = 2  # columns that share one of fp8's block scales, in units
TOGETHER = 64  # rows of a tile up to which both products of a block are in registers at once


def grouped_matmul(
    source: MatmulOperands,
    tiles: Tiles,
    config: QuantisedConfig,
    unit: Callable[[Array, Array], Array] | None = None,
    biases: tuple[Float[Array, "E _out"] | None, ...] = (None, None),
    *,
    num_rows: int | None = None,
) -> Float[Array, "Q out"]:
    """`x[r] @ W[e].T + b[e]`, or `unit` of two such products (gated), for the rows of each tile.

    Args:
      source: bfloat16 rows, packed weights of one format, and the adapters' steps.
      tiles: of at most `config.tile_rows` rows.
      config: how the call is cut.
      unit: the gated unit of two products; None for one product.
      biases: for each weight its bias, or None.
      num_rows: Q, where x is the rows of one tile, which all tiles read; None where it is sorted rows.

    Returns:
      `[Q, out]` in x's dtype; rows that no tile covers are not written.
    """
    depth, rows = source.x.shape[1], num_rows or source.x.shape[0]
    weights: tuple[Quantised, ...] = source.weights  # type: ignore[assignment]
    form, gated = weights[0].format, len(weights) == 2
    per_block, per_row = form.block == (128, 128), form.codec == "fp8" and form.block == (1, 0)
    adapted, out_width = source.steps is not None, weights[0].shape[-2]
    warpgroups, units, stages, tile_rows = config.warpgroups, config.units, config.stages, config.tile_rows
    part_rows = HALF * warpgroups
    columns = part_rows if gated else PARTS * part_rows
    blocks = pl.cdiv(out_width, columns)
    depth_steps = pl.cdiv(depth, units * UNIT)
    given = [index for index, bias in enumerate(biases) if bias is not None]

    def body(expert_of, start_of, rows_of, count, *refs, **smem):
        first_step_of, steps_of, entries, x, w0, w1, hidden, b0, b1, scales0, scales1, *rest = refs
        bias_of, out = dict(zip(given, rest, strict=False)), rest[-1]
        weight_ring, row_ring, out_tile, full, empty = (
            smem[n] for n in ("weights", "rows", "out_tile", "full", "empty")
        )
        warpgroup = lax.axis_index("wg")
        items = count[0] * blocks
        if adapted:
            page_ring, hidden_ring, pages_full, pages_empty = (
                smem[name] for name in ("pages", "hidden", "pages_full", "pages_empty")
            )

        def two_rings(zero):
            return zero, zero

        def place(number):
            """Tile, first columns and LoRA steps of an item; consecutive items share a tile."""
            tile, block = lax.div(number, jnp.int32(blocks)), lax.rem(number, jnp.int32(blocks))
            return tile, block * columns, steps_of[tile, 0] if adapted else 0

        def column(first, part):
            return first + (0 if gated else part * part_rows)

        @pl.when(warpgroup == warpgroups)
        def _memory():
            ring.give_registers(warpgroups)

            def item(number, steps_so_far):
                done, lora_done = steps_so_far
                tile, first, lora_steps = place(number)
                expert = expert_of[tile]
                row = pl.multiple_of(start_of[tile] if num_rows is None else expert * 0, ROW_ALIGNMENT)

                @pl.loop(0, depth_steps)
                def _(k):
                    stage = ring.wait_until_empty(empty, done + k, stages)
                    plgpu.commit_smem()  # threads have read the stage, TMA is to write it
                    for part, weight in enumerate((w0, w1)):
                        some = pl.ds(lax.div(column(first, part), jnp.int32(UNIT)), warpgroups)
                        origin = weight.at[expert, some, pl.ds(k * units, units)]
                        plgpu.copy_gmem_to_smem(origin, weight_ring.at[stage, part], full.at[stage])
                    for nth in range(units):
                        some = pl.ds((k * units + nth) * UNIT, UNIT)
                        plgpu.copy_gmem_to_smem(
                            x.at[pl.ds(row, tile_rows), some], row_ring.at[stage, nth], full.at[stage]
                        )

                done = done + depth_steps
                if not adapted:
                    return done, lora_done

                @pl.loop(0, lora_steps)
                def _(k):
                    page_ids = [
                        [entries[side, tile, k * PAGES_A_STEP + q] for q in range(PAGES_A_STEP)]
                        for side in (PAGE_B0, PAGE_B1)
                    ]
                    stage = ring.wait_until_empty(pages_empty, lora_done + k, PAGE_STAGES)
                    for part, pool in enumerate((b0, b1)):
                        for q, page in enumerate(page_ids[part]):
                            plgpu.copy_gmem_to_smem(
                                pool.at[page, :, pl.ds(column(first, part), part_rows)],
                                page_ring.at[stage, part, pl.ds(q * RANK_PAGE, RANK_PAGE)],
                                pages_full.at[stage],
                            )
                    own = hidden.at[first_step_of[tile, 0] + k]
                    plgpu.copy_gmem_to_smem(own, hidden_ring.at[stage], pages_full.at[stage])

                return done, lora_done + lora_steps

            done, lora_done = ring.over_items(items, config.num_sms, item, two_rings)
            ring.drain(empty, done, stages)
            if adapted:
                ring.drain(pages_empty, lora_done, PAGE_STAGES)

        @pl.when(warpgroup < warpgroups)
        def _compute():
            ring.take_registers(warpgroups)

            def release(step):
                plgpu.barrier_arrive(empty.at[ring.stage_of(step, stages)])

            def rows_at(stage, nth):
                return row_ring.at[stage, nth].T

            def operand(stage, part, nth):
                words = weight_ring.at[stage, part, warpgroup, nth]
                if not config.interpreted:
                    return unpacked(form, words)
                smem["unpacked"][warpgroup] = _numbers(form, words[...])
                return smem["unpacked"].at[warpgroup]

            def accumulators():
                return [plgpu.ACC((HALF, tile_rows))] * PARTS

            def expand(accs, lora_done, lora_steps):
                """Adds the LoRA steps' products."""

                @pl.loop(0, lora_steps)
                def _(k):
                    stage = ring.stage_of(lora_done + k, PAGE_STAGES)
                    plgpu.barrier_wait(pages_full.at[stage])
                    own = pl.ds(warpgroup * HALF, HALF)
                    for part, acc in enumerate(accs):
                        plgpu.wgmma(acc, page_ring.at[stage, part, :, own].T, hidden_ring.at[stage].T)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(pages_empty.at[stage])

            def plain(done, then):
                """The products over all of K, without fp8's scales; `then` adds to them."""

                def multiply(*accs):
                    @pl.loop(0, depth_steps)
                    def _(k):
                        stage = ring.stage_of(done + k, stages)
                        plgpu.barrier_wait(full.at[stage])
                        for nth in range(units):
                            for part, acc in enumerate(accs):
                                plgpu.wgmma(acc, operand(stage, part, nth), rows_at(stage, nth))
                            if (nth + 1) % IN_FLIGHT == 0 or nth + 1 == units:
                                plgpu.wgmma_wait(0)
                        release(done + k)

                    then(accs)
                    return tuple(acc[...] for acc in accs)

                return pl.run_scoped(multiply, *accumulators())

            def by_blocks(done, expert, first):
                """The sums over all of K of products of 128 columns times their scale."""
                last = -(-out_width // 128) - 1
                of_rows = [
                    jnp.minimum(lax.div(column(first, part) + warpgroup * HALF, jnp.int32(128)), last)
                    for part in range(PARTS)
                ]
                tables = (scales0, scales1)
                groups = [tuple(range(PARTS))] if tile_rows <= TOGETHER else [(part,) for part in range(PARTS)]

                def step(k, totals):
                    stage = ring.stage_of(done + k, stages)
                    whole = range(units // BLOCK_UNITS)
                    # Read before the wait, which hides what the reads take.
                    factors = [
                        [tables[part][expert, of_rows[part], k * len(whole) + nth] for part in range(PARTS)]
                        for nth in whole
                    ]
                    plgpu.barrier_wait(full.at[stage])
                    sums = list(totals)
                    for nth in whole:
                        for group in groups:

                            def multiply(*accs, group=group, nth=nth):
                                for own in range(nth * BLOCK_UNITS, (nth + 1) * BLOCK_UNITS):
                                    for part, acc in zip(group, accs, strict=True):
                                        plgpu.wgmma(acc, operand(stage, part, own), rows_at(stage, own))
                                return tuple(acc[...] for acc in accs)

                            found = pl.run_scoped(multiply, *accumulators()[: len(group)])
                            for part, product in zip(group, found, strict=True):
                                sums[part] = sums[part] + product * factors[nth][part]
                    release(done + k)
                    return tuple(sums)

                zeros = plgpu.layout_cast(jnp.zeros((HALF, tile_rows), jnp.float32), plgpu.Layout.WGMMA)
                return lax.fori_loop(0, depth_steps, step, (zeros,) * PARTS)

            def item(number, steps_so_far):
                done, lora_done = steps_so_far
                tile, first, lora_steps = place(number)
                expert = expert_of[tile]
                add_adapters = partial(expand, lora_done=lora_done, lora_steps=lora_steps)
                if per_block:
                    totals = by_blocks(done, expert, first)
                else:
                    totals = plain(done, add_adapters if adapted and not per_row else lambda accs: None)
                begins = [column(first, part) + warpgroup * HALF for part in range(PARTS)]
                # Widths are multiples of 64, so that these rows of weights are all inside or all outside.
                own = [pl.ds(jnp.minimum(begin, out_width - HALF), HALF) for begin in begins]

                def down(vector, part):
                    loaded = plgpu.load(vector.at[expert, own[part]], layout=DOWN, optimized=False)
                    return lax.broadcast_in_dim(loaded.astype(jnp.float32), (HALF, tile_rows), (0,))

                if per_row:
                    totals = tuple(
                        total * down(table, part)
                        for part, (total, table) in enumerate(zip(totals, (scales0, scales1), strict=True))
                    )
                if adapted and (per_block or per_row):

                    def update(*accs, add_adapters=add_adapters):
                        add_adapters(accs)
                        return tuple(acc[...] for acc in accs)

                    updates = pl.run_scoped(update, *accumulators())
                    totals = tuple(total + update for total, update in zip(totals, updates, strict=True))
                added = [bias_of.get(part if gated else 0) for part in range(PARTS)]
                parts = [
                    total if bias is None else total + down(bias, part)
                    for part, (total, bias) in enumerate(zip(totals, added, strict=True))
                ]
                values = [unit(*parts)] if unit else parts
                for begin, value in zip(begins, values, strict=False):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    mine = out_tile.at[warpgroup]
                    mine.T[...] = plgpu.layout_cast(value.astype(out.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                    plgpu.commit_smem()
                    ring.store_rows(mine, out, start_of[tile], rows_of[tile], pl.ds(begin, HALF))
                return done + depth_steps, lora_done + lora_steps

            ring.over_items(items, config.num_sms, item, two_rings)
            plgpu.wait_smem_to_gmem(0)

    dtype = source.x.dtype
    scratch: dict[str, Any] = {
        "weights": plgpu.SMEM((stages, PARTS, warpgroups, units, *unit_shape(form)), jnp.int32),
        "rows": ring.tile_smem((stages, units, tile_rows, UNIT), dtype),
        "out_tile": ring.row_smem((warpgroups, tile_rows, HALF), dtype),
        "full": plgpu.Barrier(num_arrivals=PARTS + units, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    }
    if adapted:
        scratch |= {
            "pages": ring.tile_smem((PAGE_STAGES, PARTS, PAGES_A_STEP * RANK_PAGE, part_rows), dtype),
            "hidden": ring.tile_smem((PAGE_STAGES, tile_rows, UNIT), dtype),
            "pages_full": plgpu.Barrier(num_arrivals=PAGE_COPIES + 1, num_barriers=PAGE_STAGES),
            "pages_empty": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=PAGE_STAGES),
        }
    if config.interpreted:
        scratch["unpacked"] = ring.tile_smem((warpgroups, UNIT, UNIT), dtype)
    body.__name__ = f"{'gated_' if gated else ''}matmul_{form.name}"
    kernel = ring.run(body, jax.ShapeDtypeStruct((rows, out_width), dtype), scratch, config.num_sms, warpgroups)
    values = tuple(weight.values for weight in weights)
    lists = source._replace(weights=values).operands(tiles.start)
    scales = [_scale_table(weight, tiles.start) for weight in (weights[0], weights[-1])]
    own_biases = [bias for bias in biases if bias is not None]
    return kernel(tiles.expert, tiles.start, tiles.rows, tiles.count.reshape(-1), *lists, *scales, *own_biases)


def _scale_table(weight: Quantised, unused: Array) -> Array:
    """fp8's scales as the kernel reads them: of blocks `[E, rows, columns]`, or of rows `[E, out]`."""
    if weight.format.codec != "fp8":
        return unused
    return weight.scales if weight.format.block[0] == 128 else weight.scales[..., 0]


def _numbers(form: Format, words: Array) -> Array:
    """What `unpacked` gives, for the interpreter, which has no value-returning inline code."""
    unit = Quantised(words[None, None], jnp.zeros((0, 0), jnp.bfloat16), form)
    return (
        numbers_of(unpack(unit).values).astype(jnp.bfloat16) if form.codec == "fp8" else dequantise(unit, jnp.bfloat16)
    )

"""The lists of LoRA steps in one kernel: a warpgroup a tile, slots and entries as rows and columns of comparisons.

A warpgroup reads how many rows lie before each slot of its tile's expert, cuts them to the tile, and looks up the
slots' pages. A slot's first entry is a sum over the slots before it; an entry's slot is the number of slots that end
before it; its pages are sums over all slots of which only the own one counts. No scatter, no atomics.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from pallas_kernels import mosaic
from pallas_kernels.hopper import ring
from pallas_kernels.hopper.counting import BLOCK, Comparisons
from pallas_kernels.lora_steps.api import StepLayout
from pallas_kernels.lora_steps.entries import PAGES_A_STEP
from pallas_kernels.plan.tiles import Tiles

WARPGROUPS = 4
FIRST_A, FIRST_B, COUNT, FACTOR = range(4)  # fields of the packed tables

# What is known of each slot, a row of shared memory each. Pages are kept less the entry's number, for an addition.
TOTAL, PASSED, LAST, BORDER, ALIASED, OF_BEGIN, OF_END, A0, B0, SCALE0, A1, B1, SCALE1 = range(13)


def lists(
    tiles: Tiles,
    starts: Int[Array, "E"],
    before: Int[Array, "before"],
    packed: Int[Array, "M E 4 C 64"],
    num_slots: int,
    layouts: tuple[StepLayout, ...],
) -> list[tuple[Array, Array, Array]]:
    """`(first [N, 64], count [N, 64], entries [6, N, J])` for each of `layouts` (see `LoRASteps`).

    Args:
      tiles: those whose steps are listed.
      starts: first row of each expert.
      before: see `RoutingPlan`.
      packed: tables of the projections, one after the other, as `hopper.py` packs them.
      num_slots: S.
      layouts: how the steps of each projection, or of each two that share their rows, are cut.
    """
    num_tiles, chunks = tiles.expert.shape[0], packed.shape[3]
    segments = num_slots + 1
    # Few slots are compared with in a narrow square; beyond 64 in several whole ones.
    width = min(BLOCK, -(-num_slots // 8) * 8)

    def list_steps(expert_of, start_of, rows_of, starts, before, packed, *refs):
        *outs, facts = refs
        warpgroup = lax.axis_index("wg")
        job = lax.axis_index("job") * WARPGROUPS + warpgroup
        facts = facts.at[warpgroup]
        compare = Comparisons(width)
        index, column, read, down = compare.lane, compare.column, compare.rows, compare.down

        def spread(value):
            """One value 64 times, in the layout that can be stored."""
            return jnp.where(index < BLOCK, value, 0)

        def across(fact, chunk):
            return compare.across(facts.at[fact, chunk, pl.ds(0, width)])

        def over_slots(term):
            """Sum of `term(chunk)`, `[64, width]` with slots across, over all slots: one value a row."""
            return sum(term(chunk).sum(1) for chunk in range(chunks))

        def learn_of_slots(tile, projections, aliases):
            """What does not depend on other slots; returns each chunk's pages and counts."""
            expert, used = expert_of[tile], rows_of[tile]
            earlier = before[expert * segments] + start_of[tile] - starts[expert]  # pairs before the tile's first row
            pages = []
            for chunk in range(chunks):
                low, high = (
                    read(before.at[pl.ds(expert * segments + chunk * BLOCK + end, BLOCK)]) - earlier for end in (0, 1)
                )
                is_slot = index + chunk * BLOCK < num_slots
                begin, end = jnp.clip(low, 0, used), jnp.clip(high, 0, used)
                present = (end > begin) & is_slot
                looked_up = [
                    [read(packed.at[module, expert, kind, chunk]) for kind in range(4)] for module in projections
                ]
                counts = [jnp.where(present, own[COUNT], 0) for own in looked_up]
                aliased = index < 0  # none
                if aliases:
                    one, other = looked_up
                    aliased = (one[FIRST_A] == other[FIRST_A]) & (one[COUNT] == other[COUNT])
                    aliased = aliased & (one[FACTOR] == other[FACTOR])
                    counts[1] = jnp.where(aliased, 0, counts[1])
                    facts[ALIASED, chunk] = aliased.astype(jnp.int32)
                facts[TOTAL, chunk] = sum(counts)
                facts[PASSED, chunk] = (is_slot & (high <= 0)).astype(jnp.int32)
                facts[OF_BEGIN, chunk], facts[OF_END, chunk] = begin, end
                facts[SCALE0, chunk], facts[SCALE1, chunk] = looked_up[0][FACTOR], looked_up[-1][FACTOR]
                pages.append((looked_up, counts, aliased))
            plgpu.commit_smem()
            return pages

        def number_entries(pages):
            """The first entry of each slot, and its pages less the entry's number."""
            for chunk, (looked_up, counts, aliased) in enumerate(pages):
                slot = down(index + chunk * BLOCK)
                first = over_slots(lambda c, slot=slot: jnp.where(column + c * BLOCK < slot, across(TOTAL, c), 0))
                border = first + counts[0]  # where the second projection's own entries begin
                facts[LAST, chunk], facts[BORDER, chunk] = first + sum(counts), border
                facts[A0, chunk], facts[B0, chunk] = looked_up[0][FIRST_A] - first, looked_up[0][FIRST_B] - first
                facts[A1, chunk] = looked_up[-1][FIRST_A] - border
                facts[B1, chunk] = looked_up[-1][FIRST_B] - jnp.where(aliased, first, border)
            plgpu.commit_smem()

        def write_entries(chunk, layout, tile, entries):
            number = index + chunk * BLOCK
            slot = over_slots(lambda c: (across(LAST, c) <= down(number)).astype(jnp.int32))

            def of_slot(fact):
                return over_slots(lambda c: jnp.where(column + c * BLOCK == down(slot), across(fact, c), 0))

            used = number < facts[LAST, chunks - 1, BLOCK - 1]
            page_a, page_b, scale = number + of_slot(A0), number + of_slot(B0), of_slot(SCALE0)
            page_b1 = page_b
            if layout.projections == 2:
                own = number < of_slot(BORDER)  # the first projection's entry, or one that serves both
                second, page_b1 = number + of_slot(A1), number + of_slot(B1)
                page_a = jnp.where(own, page_a, second if layout.one_pool else -1 - second)
                page_b1 = jnp.where(own & (of_slot(ALIASED) == 0) if layout.one_pool else own, 0, page_b1)
                page_b = jnp.where(own, page_b, 0)
                scale = jnp.where(own, scale, of_slot(SCALE1))
            fields = (page_a, page_b, page_b1, of_slot(OF_BEGIN), of_slot(OF_END), scale)
            for kind, value in enumerate(fields):
                entries[kind, tile, chunk] = jnp.where(used, value, 0)

        def write_tile(tile, layout, module, first, count, entries):
            projections = range(module, module + layout.projections)
            number_entries(learn_of_slots(tile, projections, layout.projections == 2 and layout.one_pool))
            total = facts[LAST, chunks - 1, BLOCK - 1]
            steps = lax.div(total + (PAGES_A_STEP - 1), jnp.int32(PAGES_A_STEP))
            count[tile] = spread(steps)
            expert = expert_of[tile]
            if layout.by_rows:
                runs = spread(before[expert * segments] + start_of[tile] - starts[expert])
            else:
                runs = over_slots(lambda c: across(PASSED, c)) + expert * num_slots + tile
            first[tile] = lax.div(runs * layout.most, jnp.int32(PAGES_A_STEP)) + tile

            @pl.loop(0, lax.div(total + (BLOCK - 1), jnp.int32(BLOCK)))
            def _(chunk):
                write_entries(chunk, layout, tile, entries)

        module = 0
        for number, layout in enumerate(layouts):
            tile = job - number * num_tiles
            own = outs[3 * number : 3 * number + 3]

            @pl.when((tile >= 0) & (tile < num_tiles))
            def _(tile=tile, layout=layout, module=module, own=own):
                write_tile(tile, layout, module, *own)

            module += layout.projections

    kernel = mosaic.kernel(
        list_steps,
        out_type=[
            jax.ShapeDtypeStruct(shape, jnp.int32)
            for layout in layouts
            for shape in ((num_tiles, BLOCK), (num_tiles, BLOCK), (6, num_tiles, layout.length // BLOCK, BLOCK))
        ],
        grid=(pl.cdiv(len(layouts) * num_tiles, WARPGROUPS),),
        grid_names=("job",),
        num_threads=WARPGROUPS,
        thread_name="wg",
        scratch_types=(plgpu.SMEM((WARPGROUPS, 13, chunks, BLOCK), jnp.int32),),
        compiler_params=ring.compiler_params(),
    )
    outs = kernel(tiles.expert, tiles.start, tiles.rows, starts, before, packed)
    triples = [outs[3 * number : 3 * number + 3] for number in range(len(layouts))]
    return [(first, count, entries.reshape(6, num_tiles, -1)) for first, count, entries in triples]

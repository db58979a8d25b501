"""The routing plan's sorted places and tiles in one kernel, by comparing all with all, for few pairs.

A pair's key orders it by expert, slot and pair. Its place follows from the number of lower keys and of those of lower
experts; a tile's expert is the number of experts whose last tile comes before it. All are sums over comparisons,
`[64, 64]` at a time: no sort, scatter or atomics.

A block does 64 pairs; or 64 tiles a warpgroup, for which it counts the rows of all experts; or 64 segments (an expert's
rows of one slot). Each of its four warpgroups counts a quarter of the keys; parts meet in shared memory.
`shared` is the barrier of the four warpgroups, `loaded` that of the keys.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from pallas_kernels import mosaic
from pallas_kernels.backend import target_sms
from pallas_kernels.hopper import ring
from pallas_kernels.hopper.counting import BLOCK, Comparisons, CountedPlaces, tiles_of, write_tiles
from pallas_kernels.plan.tiles import group_start

MAX_PAIRS, MAX_EXPERTS = 4096, 256
WARPGROUPS = 4


def runs(pairs: int, num_experts: int, num_slots: int) -> bool:
    """Whether the kernel serves these sizes: few enough pairs, and keys that fit into 31 bits."""
    bound = (num_experts + 1) * (num_slots + 1) * pairs
    return 0 < pairs <= MAX_PAIRS and num_experts <= MAX_EXPERTS and bound < 2**31


def places_and_tiles(
    keys: Int[Array, "P"], segments: int, num_experts: int, alignment: int, tile_rows: int, num_tiles: int
) -> tuple[CountedPlaces, Int[Array, "before"]]:
    """CountedPlaces of the pairs, sizes and starts of the experts, and tiles; and `before`.

    The last, int32, is the pairs of a lower (expert, slot) for each, from (0, 0) on: `E * (S + 1) + 64` or more.

    Args:
      keys: int32 `[P]`, `(expert * segments + slot) * P + pair`; skipped pairs have `num_experts` for their expert.
      segments: an expert's slots, and one more for base rows.
      num_experts: E.
      alignment: a power of two, of each expert's first row.
      tile_rows: rows that a tile holds.
      num_tiles: static bound of the tiles.
    """
    pairs = keys.shape[0]
    keys_an_expert = segments * pairs
    chunks = pl.cdiv(pairs, BLOCK)
    expert_chunks = pl.cdiv(num_experts, BLOCK)
    pair_jobs = chunks
    tile_jobs = pl.cdiv(num_tiles, WARPGROUPS * BLOCK)
    segment_chunks = pl.cdiv(num_experts * segments, BLOCK) + 1  # one more, so that 64 can be read from anywhere
    together = segment_chunks <= target_sms()  # the warpgroups of a block count for the same 64 segments
    segment_jobs = segment_chunks if together else pl.cdiv(segment_chunks, WARPGROUPS)
    last = jnp.iinfo(jnp.int32).max
    padded = jnp.full(chunks * BLOCK, last, jnp.int32).at[:pairs].set(keys).reshape(chunks, BLOCK)

    def plan_rows(keys, position, *refs):
        (*group_refs, before, tile_expert, tile_start, tile_used, tile_count), smem = refs[:7], refs[7:]
        keys_smem, parts, ends, sizes, starts, tile_ends, loaded, shared = smem
        job, warpgroup = lax.axis_index("job"), lax.axis_index("wg")

        @pl.when(warpgroup == 0)
        def _():
            plgpu.copy_gmem_to_smem(keys, keys_smem, loaded)

        plgpu.barrier_wait(loaded)
        compare = Comparisons()
        row, column, total = compare.row, compare.column, compare.total

        def across(ref, chunk):
            return compare.across(ref.at[chunk])

        def leave_part(place, count, term):
            """This warpgroup's part of a total, for `sum_of_parts` after the next `meet`."""
            parts[place * WARPGROUPS + warpgroup] = total(count, term, warpgroup, WARPGROUPS)

        def rows_of(ref, index):
            return compare.rows(ref.at[index])

        def sum_of_parts(place):
            return sum(rows_of(parts, place * WARPGROUPS + part) for part in range(WARPGROUPS))

        def store(ref, index, values):
            ref[index] = values

        def meet():
            plgpu.barrier_arrive(shared)
            plgpu.barrier_wait(shared)

        def expert_of_column(chunk):
            return column + chunk * BLOCK

        def count_experts():
            for block in range(expert_chunks):
                end = jnp.minimum(row + (block * BLOCK + 1), num_experts) * keys_an_expert
                leave_part(block, chunks, lambda c, end=end: (across(keys_smem, c) < end).astype(jnp.int32))
            meet()
            mine = warpgroup < expert_chunks
            expert = row + warpgroup * BLOCK
            pl.when(mine)(lambda: store(ends, warpgroup, sum_of_parts(warpgroup)))
            meet()

            def end_before(chunk):
                return jnp.where(expert_of_column(chunk) == expert - 1, across(ends, chunk), 0)

            pl.when(mine)(lambda: store(sizes, warpgroup, rows_of(ends, warpgroup) - total(expert_chunks, end_before)))
            meet()

            def tiles_to(chunk):
                count = tiles_of(across(sizes, chunk), tile_rows)
                return jnp.where(expert_of_column(chunk) <= expert, count, 0)

            @pl.when(mine)
            def _():
                lower = rows_of(ends, warpgroup) - rows_of(sizes, warpgroup)
                starts[warpgroup] = group_start(lower, compare.lane + warpgroup * BLOCK, alignment)
                tile_ends[warpgroup] = total(expert_chunks, tiles_to)

            meet()

        pl.when((job >= pair_jobs) & (job < pair_jobs + tile_jobs))(count_experts)

        @pl.when(job < pair_jobs)
        def _():
            mine = rows_of(keys_smem, job)
            expert = lax.div(mine, jnp.int32(keys_an_expert))
            for place, bound in enumerate((compare.down(mine), compare.down(expert * keys_an_expert))):
                leave_part(place, chunks, lambda c, bound=bound: (across(keys_smem, c) < bound).astype(jnp.int32))
            meet()

            @pl.when(warpgroup == 0)
            def _():
                lower = sum_of_parts(1)
                position[job] = sum_of_parts(0) - lower + group_start(lower, expert, alignment)

        @pl.when(job >= pair_jobs + tile_jobs)
        def _():
            number = job - pair_jobs - tile_jobs

            def lower(chunk):
                first = (row + jnp.minimum(chunk * BLOCK, num_experts * segments)) * pairs
                return lambda c: (across(keys_smem, c) < first).astype(jnp.int32)

            if together:
                leave_part(0, chunks, lower(number))
                meet()
                pl.when(warpgroup == 0)(lambda: store(before, number, sum_of_parts(0)))
            else:
                chunk = number * WARPGROUPS + warpgroup
                pl.when(chunk < segment_chunks)(lambda: store(before, chunk, total(chunks, lower(chunk))))

        @pl.when((job >= pair_jobs) & (job < pair_jobs + tile_jobs))
        def _():
            chunk = (job - pair_jobs) * WARPGROUPS + warpgroup

            @pl.when((job == pair_jobs) & (warpgroup < expert_chunks))
            def _():
                for ref, out in zip((sizes, starts), group_refs, strict=True):
                    out[warpgroup] = rows_of(ref, warpgroup)

            @pl.when((job == pair_jobs) & (warpgroup == 0))
            def _():
                def of_last(c):
                    return jnp.where(expert_of_column(c) == num_experts - 1, across(tile_ends, c), 0)

                tile_count[...] = total(expert_chunks, of_last)

            @pl.when(chunk * BLOCK < num_tiles)
            def _():
                tables = tile_expert, tile_start, tile_used
                write_tiles(compare, chunk, (sizes, starts, tile_ends), expert_chunks, tile_rows, tables)

    tile_chunks = pl.cdiv(num_tiles, BLOCK)
    lengths = (chunks, expert_chunks, expert_chunks, segment_chunks, tile_chunks, tile_chunks, tile_chunks)
    position, sizes, starts, before, *tables, count = mosaic.kernel(
        plan_rows,
        out_type=(
            *[jax.ShapeDtypeStruct((length, BLOCK), jnp.int32) for length in lengths],
            jax.ShapeDtypeStruct((BLOCK,), jnp.int32),
        ),
        grid=(pair_jobs + tile_jobs + segment_jobs,),
        grid_names=("job",),
        num_threads=WARPGROUPS,
        thread_name="wg",
        scratch_types=(
            plgpu.SMEM((chunks, BLOCK), jnp.int32),
            plgpu.SMEM((max(expert_chunks, 2) * WARPGROUPS, BLOCK), jnp.int32),
            *[plgpu.SMEM((expert_chunks, BLOCK), jnp.int32)] * 4,
            plgpu.Barrier(num_arrivals=1),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        ),
        compiler_params=ring.compiler_params(),
    )(padded)
    return CountedPlaces.from_blocks((position, sizes, starts, *tables, count), pairs, num_experts), before.reshape(-1)

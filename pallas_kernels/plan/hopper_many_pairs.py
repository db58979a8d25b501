"""The routing plan's sorted places of many pairs, by counting in two kernels; one of them also cuts the tiles.

A stable counting sort by group (an expert, or a slot). The first kernel counts each group in each chunk of 512 ids. The
second gives an id its place: where its group begins, those of the group in earlier chunks, and those before it in its
own chunk, which it counts by comparing. Every block sums all chunks' counts for itself, so that none waits for another.

Sorting by (expert, slot) is two such sorts: of the tokens by slot, then of their pairs by expert.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from pallas_kernels import mosaic
from pallas_kernels.hopper import ring
from pallas_kernels.hopper.counting import BLOCK, Comparisons, CountedPlaces, tiles_of, write_tiles
from pallas_kernels.plan.tiles import group_start

WARPGROUPS = 4
PARTS = 2 * WARPGROUPS  # of a chunk: a warpgroup places one with few ids before it, and one with many
CHUNK = PARTS * BLOCK
COUNT_BYTES = 196_608  # of shared memory
MAX_CHUNKS = 256  # the longest side of a TMA box


def runs(ids: int, groups: int) -> bool:
    """Whether one copy brings all chunks' counts into a block's shared memory."""
    chunks, blocks = pl.cdiv(ids, CHUNK), pl.cdiv(groups + 1, BLOCK)
    return 0 < chunks <= MAX_CHUNKS and 4 * chunks * blocks * BLOCK <= COUNT_BYTES


def places(
    ids: Int[Array, "N"], groups: int, alignment: int = 1, tile_rows: int = 1, num_tiles: int = 1
) -> CountedPlaces:
    """Place of each id in a stable sort, each group's first a multiple of `alignment`, and the groups cut into tiles.

    Args:
      ids: int32 `[N]`, `0 .. groups`; the last value's come after all groups, and are in no tile.
      groups: how many values count; experts, or slots.
      alignment: a power of two, of each group's first place.
      tile_rows: rows that a tile holds.
      num_tiles: static bound of the tiles.
    """
    chunks, blocks = pl.cdiv(ids.shape[0], CHUNK), pl.cdiv(groups + 1, BLOCK)
    padded = jnp.full(chunks * CHUNK, groups + 1, jnp.int32).at[: ids.shape[0]].set(ids)
    padded = padded.reshape(chunks, PARTS, BLOCK)
    counts = _count(padded, blocks)
    return CountedPlaces.from_blocks(
        _place(padded, counts, groups, alignment, tile_rows, num_tiles), ids.shape[0], groups
    )


def _count(ids: Int[Array, "chunks parts 64"], blocks: int) -> Int[Array, "chunks blocks 64"]:
    """How many ids of each chunk are of each group."""
    chunks = ids.shape[0]

    def count_groups(ids, counts, own, loaded):
        chunk, warpgroup = lax.axis_index("chunk"), lax.axis_index("wg")
        pl.when(warpgroup == 0)(lambda: plgpu.copy_gmem_to_smem(ids.at[chunk], own, loaded))
        plgpu.barrier_wait(loaded)
        compare = Comparisons()
        for block in range(blocks):

            @pl.when(warpgroup == block % WARPGROUPS)
            def _(block=block):
                group = compare.row + block * BLOCK
                counts[chunk, block] = compare.total(
                    PARTS, lambda part: (compare.across(own.at[part]) == group).astype(jnp.int32)
                )

    return mosaic.kernel(
        count_groups,
        out_type=jax.ShapeDtypeStruct((chunks, blocks, BLOCK), jnp.int32),
        grid=(chunks,),
        grid_names=("chunk",),
        num_threads=WARPGROUPS,
        thread_name="wg",
        scratch_types=(plgpu.SMEM((PARTS, BLOCK), jnp.int32), plgpu.Barrier(num_arrivals=1)),
        compiler_params=ring.compiler_params(),
    )(ids)


def _place(
    ids: Int[Array, "chunks parts 64"],
    counts: Int[Array, "chunks blocks 64"],
    groups: int,
    alignment: int,
    tile_rows: int,
    num_tiles: int,
) -> tuple[Array, ...]:
    """Position, sizes, starts, the three tables of tiles, and their number."""
    chunks, blocks, _ = counts.shape
    tile_jobs = pl.cdiv(num_tiles, WARPGROUPS * BLOCK)

    def place_rows(ids, counts, position, *refs):
        (*group_refs, tile_expert, tile_start, tile_used, tile_count), smem = refs[:6], refs[6:]
        all_counts, own, parts, sizes, starts, first, tile_ends, loaded, shared = smem
        job, warpgroup = lax.axis_index("job"), lax.axis_index("wg")
        some_blocks = blocks + jnp.minimum(job, 0)  # not known to the compiler, which would unroll, and spill

        @pl.when(warpgroup == 0)
        def _():
            plgpu.copy_gmem_to_smem(counts, all_counts, loaded)
            plgpu.copy_gmem_to_smem(ids.at[jnp.minimum(job, chunks - 1)], own, loaded)

        plgpu.barrier_wait(loaded)
        compare = Comparisons()

        def meet():
            plgpu.barrier_arrive(shared)
            plgpu.barrier_wait(shared)

        def for_blocks(do):
            """`do(block)`, each block by one warpgroup."""
            for block in range(blocks):
                pl.when(warpgroup == block % WARPGROUPS)(lambda block=block: do(block))

        def add_chunk(index, sums):
            chunk = warpgroup + index * WARPGROUPS
            found = [compare.rows(all_counts.at[chunk, block]) for block in range(blocks)]
            earlier = [own_count * (chunk < job).astype(jnp.int32) for own_count in found]
            return tuple(total + more for total, more in zip(sums, (*found, *earlier), strict=True))

        zero = jnp.where(compare.lane < 0, 1, 0)
        rounds = lax.div(chunks - warpgroup + (WARPGROUPS - 1), jnp.int32(WARPGROUPS))
        for index, part in enumerate(lax.fori_loop(0, rounds, add_chunk, (zero,) * (2 * blocks))):
            parts[index * WARPGROUPS + warpgroup] = part
        meet()

        def sum_of_parts(index):
            return sum(compare.rows(parts.at[index * WARPGROUPS + part]) for part in range(WARPGROUPS))

        def sum_up(block):
            sizes[block] = sum_of_parts(block)

        for_blocks(sum_up)
        meet()

        def begin(block):
            group = compare.row + block * BLOCK
            other = lambda c: compare.column + c * BLOCK  # noqa: E731
            lower = compare.total(some_blocks, lambda c: jnp.where(other(c) < group, compare.across(sizes.at[c]), 0))
            start = lower if alignment == 1 else group_start(lower, compare.lane + block * BLOCK, alignment)
            starts[block], first[block] = start, start + sum_of_parts(blocks + block)

            def tiles_to(c):
                counted = (other(c) <= group) & (other(c) < groups)
                return jnp.where(counted, tiles_of(compare.across(sizes.at[c]), tile_rows), 0)

            tile_ends[block] = compare.total(some_blocks, tiles_to)

        for_blocks(begin)
        meet()

        @pl.when(job < chunks)
        def _():
            @pl.loop(0, 2)
            def _(half):
                part = jnp.where(half == 0, warpgroup, PARTS - 1 - warpgroup)
                mine = compare.rows(own.at[part])

                def same_before(c):
                    earlier = compare.column + (c - part) * BLOCK < compare.row
                    return ((compare.across(own.at[c]) == compare.down(mine)) & earlier).astype(jnp.int32)

                def begin_of_own(c):
                    is_own = compare.column + c * BLOCK == compare.down(mine)
                    return jnp.where(is_own, compare.across(first.at[c]), 0)

                position[job * PARTS + part] = compare.total(some_blocks, begin_of_own) + compare.total(
                    part + 1, same_before
                )

        @pl.when(job >= chunks)
        def _():
            @pl.when(job == chunks)
            def _():
                def copy_out(block):
                    for ref, out in zip((sizes, starts), group_refs, strict=True):
                        out[block] = compare.rows(ref.at[block])

                for_blocks(copy_out)

                @pl.when(warpgroup == 0)
                def _():
                    def of_last(c):
                        return jnp.where(compare.column + c * BLOCK == groups - 1, compare.across(tile_ends.at[c]), 0)

                    tile_count[...] = compare.total(some_blocks, of_last)

            chunk = (job - chunks) * WARPGROUPS + warpgroup

            @pl.when(chunk * BLOCK < num_tiles)
            def _():
                tables = tile_expert, tile_start, tile_used
                write_tiles(compare, chunk, (sizes, starts, tile_ends), some_blocks, tile_rows, tables)

    tile_chunks = pl.cdiv(num_tiles, BLOCK)
    lengths = (chunks * PARTS, blocks, blocks, tile_chunks, tile_chunks, tile_chunks)
    of_groups = plgpu.SMEM((blocks, BLOCK), jnp.int32)
    return mosaic.kernel(
        place_rows,
        out_type=(
            *[jax.ShapeDtypeStruct((length, BLOCK), jnp.int32) for length in lengths],
            jax.ShapeDtypeStruct((BLOCK,), jnp.int32),
        ),
        grid=(chunks + tile_jobs,),
        grid_names=("job",),
        num_threads=WARPGROUPS,
        thread_name="wg",
        scratch_types=(
            plgpu.SMEM((chunks, blocks, BLOCK), jnp.int32),
            plgpu.SMEM((PARTS, BLOCK), jnp.int32),
            plgpu.SMEM((2 * blocks * WARPGROUPS, BLOCK), jnp.int32),
            *[of_groups] * 4,
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        ),
        compiler_params=ring.compiler_params(),
    )(ids, counts)

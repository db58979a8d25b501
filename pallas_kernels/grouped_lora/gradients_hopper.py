"""The pages' gradients on Hopper: contractions over the ragged runs of rows that use a page.

`dA = (dy B)^T x` and `dB = (x A^T)^T dy` are one kernel: hidden rows of few columns against rows of many, summed over
the rows of an (expert, slot), and over all experts that share the page. The hidden rows come from the forward's shrink
kernel (with A and B in each other's place for `dy B`), brought from its steps into `[ranks, Q]`, rows side by side.

A work item is 64 ranks of one page run times 256 of its columns. The memory warpgroup streams 64 rows a stage: the
hidden rows' `[64 ranks, 64 rows]` and two halves of 128 columns, one for each compute warpgroup, whose accumulator is
`[64 ranks, 128 columns]`. Rows come in aligned windows of 64, so a window's other rows are another run's: the hidden
values of those are cleared, in a copy of their own. Whole output tiles, one block each, in sorted order:
no atomics, the same bits every time. `full[s]` counts the three copies of a stage, `empty[s]` the two warpgroups.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic
from pallas_kernels.backend import UnsupportedImplementation
from pallas_kernels.entries import BEGIN, END, PAGES_A_STEP, RANKS
from pallas_kernels.grouped_lora import hopper
from pallas_kernels.grouped_lora.pages import RANK_PAGE, LoRAPages
from pallas_kernels.mosaic import COMPUTE_WARPGROUPS, DEPTH
from pallas_kernels.plan import RoutingPlan, Tiles
from pallas_kernels.steps import LoRASteps, make_steps

COLUMNS = 128  # of a compute warpgroup
STORED = 32  # float32 columns that one store takes: 128 bytes
STAGES = 4
BUFFERS = 2  # of results on their way out


class Runs(NamedTuple):
    """For each (slot, expert), int32 `[S * E]`: the rows `begin .. end`, the page run that they add to, its pages.

    A run of experts that share their pages is summed at its first one, up to `stop`; the others, and those without
    pages, have `pages` 0.
    """

    begin: Int[Array, "N"]
    end: Int[Array, "N"]
    first: Int[Array, "N"]
    pages: Int[Array, "N"]
    stop: Int[Array, "N"]


def page_gradients(
    x: Float[Array, "Q in"],
    dy: Float[Array, "Q out"],
    pages: LoRAPages,
    plan: RoutingPlan,
    num_sms: int = mosaic.NUM_SMS,
) -> tuple[Float[Array, "N_A 16 in"], Float[Array, "N_B 16 out"]]:
    """What `api.page_gradients` promises."""
    if plan.alignment % mosaic.ROW_ALIGNMENT:
        raise UnsupportedImplementation(
            f"The plan aligns experts to {plan.alignment} rows, hopper needs {mosaic.ROW_ALIGNMENT}; "
            "give make_plan implementation='hopper'."
        )
    other = pages.transposed()
    forward, backward = make_steps(plan, ((pages,), (other,)))
    assert forward is not None
    assert backward is not None
    hidden = by_rank(hopper.shrink(x, (pages.a,), plan.tiles, forward, num_sms), forward, pages, plan)
    dhidden = by_rank(hopper.shrink(dy, (other.a,), plan.tiles, backward, num_sms), backward, pages, plan)
    found = []
    for column, (left, right, pool) in enumerate(((dhidden, x, pages.a), (hidden, dy, pages.b))):
        runs = runs_of(plan, pages, column)
        total = contract(left, right, runs, pool.shape[0], num_sms)
        ids = runs.first[:, None] + jnp.arange(left.shape[0] // RANK_PAGE, dtype=jnp.int32)[None, :]
        live = jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :] < runs.pages[:, None]
        written = jnp.zeros(pool.shape[0], bool).at[jnp.where(live, ids, pool.shape[0])].set(True, mode="drop")
        found.append(jnp.where(written[:, None, None], total, 0.0))
    return found[0], found[1]


def runs_of(plan: RoutingPlan, pages: LoRAPages, column: int) -> Runs:
    """`column`: of the table, 0 for the pages of A and 1 for those of B."""
    sizes = plan.segment_sizes
    ends = plan.group_starts[:, None] + jnp.cumsum(sizes, axis=1)
    begin, end = ((v[:, :-1]).T for v in (ends - sizes, ends))
    first, count = pages.table[..., column], pages.table[..., 2]
    slots, experts = first.shape
    index, has = jnp.arange(experts, dtype=jnp.int32)[None, :], count > 0
    # The last expert before each that has pages: a run goes on past experts that have none.
    last = lax.cummax(jnp.where(has, index, -1), axis=1)
    last = jnp.concatenate([jnp.full((slots, 1), -1, jnp.int32), last[:, :-1]], axis=1)
    before = jnp.take_along_axis(first, jnp.maximum(last, 0), axis=1)
    same = has & (last >= 0) & (before == first)
    borders = jnp.where(has & ~same, index, experts)  # where the next run begins: the smallest border beyond
    following = lax.cummin(jnp.concatenate([borders[:, 1:], jnp.full((slots, 1), experts, jnp.int32)], 1), 1, True)
    base = jnp.arange(slots, dtype=jnp.int32)[:, None] * experts
    fields = begin, end, first, jnp.where(same, 0, count), base + following
    return Runs(*(field.reshape(-1).astype(jnp.int32) for field in fields))


def by_rank(
    hidden: Float[Array, "N rows 64"], steps: LoRASteps, pages: LoRAPages, plan: RoutingPlan
) -> Float[Array, "ranks columns"]:
    """The shrink's H by rank and sorted row: each row's own adapter's, zeros beyond its rank. Both multiples of 64."""
    tiles = plan.tiles
    rows = jnp.arange(-(-plan.order.shape[0] // DEPTH) * DEPTH, dtype=jnp.int32)
    tile = _tile_of(rows, tiles)
    local = rows - tiles.start[tile]
    # Of the entries of a row's tile; those beyond its steps are not written.
    begin, end = steps.entries[BEGIN][tile], steps.entries[END][tile]
    written = jnp.arange(begin.shape[1], dtype=jnp.int32)[None, :] < steps.count[tile, :1] * PAGES_A_STEP
    before = (written & (end > begin) & (end <= local[:, None])).sum(1, dtype=jnp.int32)
    count = (written & (begin <= local[:, None]) & (local[:, None] < end)).sum(1, dtype=jnp.int32)
    most = -(-pages.max_rank // RANK_PAGE)
    page = jnp.arange(most, dtype=jnp.int32)[:, None]
    entry = before[None, :] + page
    live = page < count[None, :]
    step = jnp.where(live, steps.first[tile, 0][None, :] + entry // PAGES_A_STEP, 0)
    sixteen = hidden.reshape(*hidden.shape[:2], PAGES_A_STEP, RANK_PAGE)
    own = sixteen[step, jnp.where(live, local[None, :], 0), entry % PAGES_A_STEP]  # [pages, Q, 16]
    by_rank = jnp.where(live[:, :, None], own, 0).transpose(0, 2, 1).reshape(-1, rows.shape[0])
    return jnp.pad(by_rank, ((0, -by_rank.shape[0] % RANKS), (0, 0)))


def _tile_of(rows: Int[Array, "Q"], tiles: Tiles) -> Int[Array, "Q"]:
    """The last tile that begins at a row or before it."""
    index = jnp.arange(tiles.start.shape[0], dtype=jnp.int32)
    starts = jnp.where(index < tiles.count.reshape(-1)[0], tiles.start, jnp.int32(2**31 - 1))
    return jnp.maximum(jnp.searchsorted(starts, rows, side="right", method="compare_all").astype(jnp.int32) - 1, 0)


def contract(
    hidden: Float[Array, "ranks columns"],
    rows: Float[Array, "Q width"],
    runs: Runs,
    num_pages: int,
    num_sms: int = mosaic.NUM_SMS,
) -> Float[Array, "num_pages 16 width"]:
    """Of each page run the sum over its rows of `hidden[:, r] rows[r]`, in float32; other pages are not written.

    Args:
      hidden: `by_rank`'s. rows: a width that is a multiple of 64; every value finite.
    """
    ranks, width = hidden.shape[0], rows.shape[1]
    wide = COMPUTE_WARPGROUPS * COLUMNS
    rank_blocks, blocks = ranks // RANKS, pl.cdiv(width, wide)
    items = runs.begin.shape[0] * rank_blocks * blocks

    def contract_rows(begin_of, end_of, first_of, pages_of, stop_of, hidden, rows, out, **smem):
        ring, hidden_ring, cleared, out_tile, full, empty = (
            smem[name] for name in ("ring", "hidden_ring", "cleared", "out_tile", "full", "empty")
        )
        warpgroup = lax.axis_index("wg")

        def place(number):
            """An item's run, its first page of the run's, how many pages from there, and its first column."""
            block, rest = lax.rem(number, jnp.int32(blocks)), lax.div(number, jnp.int32(blocks))
            run, part = lax.div(rest, jnp.int32(rank_blocks)), lax.rem(rest, jnp.int32(rank_blocks))
            first = part * PAGES_A_STEP
            return run, first, jnp.clip(pages_of[run] - first, 0, PAGES_A_STEP), block * wide

        def over_windows(run, pages, done, window):
            """`window(row, stage step, begin, end)` for each window of 64 rows of each expert of the run."""

            def of_expert(own, done):
                begin, end = begin_of[own], end_of[own]
                first = lax.div(begin, jnp.int32(DEPTH))
                count = jnp.where(end > begin, lax.div(end + (DEPTH - 1), jnp.int32(DEPTH)) - first, 0)

                @pl.loop(0, count)
                def _(index):
                    window(pl.multiple_of((first + index) * DEPTH, DEPTH), done + index, begin, end)

                return done + count

            return lax.fori_loop(run, jnp.where(pages > 0, stop_of[run], run), of_expert, done)

        @pl.when(warpgroup == COMPUTE_WARPGROUPS)
        def _memory():
            mosaic.give_registers(COMPUTE_WARPGROUPS)

            def item(number, done):
                run, first, pages, column = place(number)

                def window(row, step, begin, end):
                    del begin, end
                    stage = mosaic.wait_until_empty(empty, step, STAGES)
                    some = pl.ds(row, DEPTH)
                    plgpu.copy_gmem_to_smem(
                        hidden.at[pl.ds(first * RANK_PAGE, RANKS), some], hidden_ring.at[stage], full.at[stage]
                    )
                    for part in range(COMPUTE_WARPGROUPS):
                        columns = pl.ds(column + part * COLUMNS, COLUMNS)
                        plgpu.copy_gmem_to_smem(rows.at[some, columns], ring.at[stage, part], full.at[stage])

                return over_windows(run, pages, done, window)

            mosaic.drain(empty, mosaic.over_items(jnp.int32(items), num_sms, item), STAGES)

        @pl.when(warpgroup < COMPUTE_WARPGROUPS)
        def _compute():
            mosaic.take_registers(COMPUTE_WARPGROUPS)
            numbers = plgpu.broadcasted_iota(jnp.int32, (RANKS, DEPTH), 1, layout=plgpu.Layout.WGMMA)

            def item(number, done):
                run, first, pages, column = place(number)

                def accumulate(acc):
                    def window(row, step, begin, end):
                        stage = mosaic.stage_of(step, STAGES)
                        plgpu.barrier_wait(full.at[stage])
                        inside = (begin <= row) & (end >= row + DEPTH)

                        @pl.when(inside)
                        def _():
                            plgpu.wgmma(acc, hidden_ring.at[stage], ring.at[stage, warpgroup])

                        @pl.when(jnp.logical_not(inside))
                        def _():
                            mine = (numbers >= begin - row) & (numbers < end - row)
                            own = jnp.where(mine, hidden_ring[stage].astype(jnp.float32), 0.0)
                            cleared.at[warpgroup][...] = own.astype(hidden.dtype)
                            plgpu.commit_smem()
                            plgpu.wgmma(acc, cleared.at[warpgroup], ring.at[stage, warpgroup])

                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(empty.at[stage])

                    over_windows(run, pages, done, window)
                    return acc[...]

                @pl.when(pages > 0)
                def _():
                    total = pl.run_scoped(accumulate, plgpu.ACC((RANKS, COLUMNS)))
                    page = first_of[run] + first
                    for part in range(COLUMNS // STORED):
                        mine = out_tile.at[warpgroup, part % BUFFERS]
                        plgpu.wait_smem_to_gmem(BUFFERS - 1, wait_read_only=True)
                        mine[...] = total[:, part * STORED : (part + 1) * STORED]
                        plgpu.commit_smem()
                        some = pl.ds(column + warpgroup * COLUMNS + part * STORED, STORED)
                        for nth in range(PAGES_A_STEP):

                            @pl.when(nth < pages)
                            def _(nth=nth, mine=mine, some=some):
                                ranks = mine.at[pl.ds(nth * RANK_PAGE, RANK_PAGE)]
                                plgpu.copy_smem_to_gmem(ranks, out.at[page + nth, :, some], commit_group=False)

                        plgpu.commit_smem_to_gmem_group()

                nothing = lambda row, step, begin, end: None  # noqa: E731
                return over_windows(run, pages, done, nothing)

            mosaic.over_items(jnp.int32(items), num_sms, item)
            plgpu.wait_smem_to_gmem(0)

    dtype = rows.dtype
    scratch = {
        "ring": mosaic.tile_smem((STAGES, COMPUTE_WARPGROUPS, DEPTH, COLUMNS), dtype),
        "hidden_ring": mosaic.tile_smem((STAGES, RANKS, DEPTH), dtype),
        "cleared": mosaic.tile_smem((COMPUTE_WARPGROUPS, RANKS, DEPTH), dtype),
        "out_tile": mosaic.row_smem((COMPUTE_WARPGROUPS, BUFFERS, RANKS, STORED), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS + 1, num_barriers=STAGES),
        "empty": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=STAGES),
    }
    out_type = jax.ShapeDtypeStruct((num_pages, RANK_PAGE, width), jnp.float32)
    return mosaic.run(contract_rows, out_type, scratch, num_sms)(*runs, hidden, rows)

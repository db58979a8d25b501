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

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.backend import target_sms
from pallas_kernels.grouped_lora.hopper_shrink import shrink_adapters
from pallas_kernels.hopper import ring
from pallas_kernels.hopper.limits import COMPUTE_WARPGROUPS, DEPTH
from pallas_kernels.lora_steps.api import Shrunk, make_lora_steps
from pallas_kernels.lora_steps.entries import BEGIN, END, PAGE_B0, PAGE_B1, PAGES_A_STEP, RANKS
from pallas_kernels.pages import RANK_PAGE, LayerPages, LoRAPages
from pallas_kernels.plan.api import RoutingPlan
from pallas_kernels.plan.tiles import Tiles

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
    dys: tuple[Float[Array, "Q _out"], ...],
    adapters: LayerPages,
    plan: RoutingPlan,
    share: Float[Array, "Q"] | None = None,
    shrunk: tuple[Shrunk | None, tuple[Shrunk | None, ...]] = (None, ()),
    num_sms: int | None = None,
) -> list[tuple[Float[Array, "_pages 16 in"], Float[Array, "_pages 16 _out"]] | None]:
    """What `api.page_gradients` promises."""
    num_sms = num_sms or target_sms()
    of_x, of_dys = shrunk
    if of_x is None:
        of_x, of_dys = _shrink(x, dys, adapters, plan, num_sms)
    given = [
        (part, dy, pages, of_dy)
        for part, (dy, pages, of_dy) in enumerate(zip(dys, adapters.projections, of_dys, strict=True))
        if pages is not None and of_dy is not None
    ]
    most = max(pages.max_rank for _, _, pages, _ in given)
    dhiddens = tuple(by_rank(of_dy, most, plan, share) for *_, of_dy in given)
    runs = tuple(runs_of(plan, pages, 0) for _, _, pages, _ in given)
    sums_a = contract(dhiddens, x, runs, tuple(pages.a.shape[0] for _, _, pages, _ in given), num_sms)
    sums: list[tuple[Array, Array] | None] = [None] * len(dys)
    for (part, dy, pages, _), of_a, sum_a in zip(given, runs, sums_a, strict=True):
        hidden, of_b = by_rank(of_x, pages.max_rank, plan, share, part), runs_of(plan, pages, 1)
        (sum_b,) = contract((hidden,), dy, (of_b,), (pages.b.shape[0],), num_sms)
        sums[part] = _written(sum_a, of_a, most), _written(sum_b, of_b, most)
    return sums


def _shrink(
    x: Array, dys: tuple[Array, ...], adapters: LayerPages, plan: RoutingPlan, num_sms: int
) -> tuple[Shrunk, tuple[Shrunk | None, ...]]:
    """Of the rows, and of each cotangent by its own transposed adapters."""
    (steps,) = make_lora_steps(plan, (adapters,))
    assert steps is not None
    of_dys = tuple(
        shrink_adapters(dy, adapters.select(place.module).transposed(), plan.tiles, steps.transposed(part), num_sms)
        if place.a
        else None
        for part, (dy, place) in enumerate(zip(dys, adapters.places, strict=True))
    )
    return shrink_adapters(x, adapters, plan.tiles, steps, num_sms), of_dys


def _written(total: Float[Array, "pages 16 width"], runs: Runs, max_rank: int) -> Float[Array, "pages 16 width"]:
    """The sums, zeros where no run wrote."""
    number = jnp.arange(-(-max_rank // RANK_PAGE), dtype=jnp.int32)[None, :]
    ids = jnp.where(number < runs.pages[:, None], runs.first[:, None] + number, total.shape[0])
    written = jnp.zeros(total.shape[0], bool).at[ids].set(True, mode="drop")
    return jnp.where(written[:, None, None], total, 0.0)


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
    shrunk: Shrunk, max_rank: int, plan: RoutingPlan, share: Float[Array, "Q"] | None = None, part: int = 0
) -> Float[Array, "ranks columns"]:
    """The shrink's H by rank and sorted row: each row's own adapter's, zeros beyond its rank. Both multiples of 64.

    Args:
      shrunk: what the shrink made of the rows.
      max_rank: no adapter has a larger rank.
      plan: as `make_plan` made it.
      share: float32 `[Q]`, a factor on each row, or None for ones.
      part: which of two projections that share their rows, 0 or 1.
    """
    tiles, steps, hidden = plan.tiles, shrunk.steps, shrunk.hidden
    rows = jnp.arange(-(-plan.order.shape[0] // DEPTH) * DEPTH, dtype=jnp.int32)
    tile = _tile_of(rows, tiles)
    local = (rows - tiles.start[tile])[:, None]
    # Of the entries of a row's tile its own, which follow one another; those beyond the tile's steps are not written.
    begin, end, page_b = (steps.entries[kind][tile] for kind in (BEGIN, END, (PAGE_B0, PAGE_B1)[part]))
    written = jnp.arange(begin.shape[1], dtype=jnp.int32)[None, :] < steps.count[tile, :1] * PAGES_A_STEP
    of_row = written & (begin <= local) & (local < end) & (page_b > 0)
    first, count = jnp.argmax(of_row, axis=1).astype(jnp.int32), of_row.sum(1, dtype=jnp.int32)
    page = jnp.arange(-(-max_rank // RANK_PAGE), dtype=jnp.int32)[:, None]
    entry, live = first[None, :] + page, page < count[None, :]
    step = jnp.where(live, steps.first[tile, 0][None, :] + entry // PAGES_A_STEP, 0)
    sixteen = hidden.reshape(*hidden.shape[:2], PAGES_A_STEP, RANK_PAGE)
    values = sixteen[step, jnp.where(live, local[None, :, 0], 0), entry % PAGES_A_STEP]  # [pages, Q, 16]
    if share is not None:
        factor = jnp.pad(share, (0, rows.shape[0] - share.shape[0]))[None, :, None]
        values = (values.astype(jnp.float32) * factor).astype(hidden.dtype)
    of_rank = jnp.where(live[:, :, None], values, 0).transpose(0, 2, 1).reshape(-1, rows.shape[0])
    return jnp.pad(of_rank, ((0, -of_rank.shape[0] % RANKS), (0, 0)))


def _tile_of(rows: Int[Array, "Q"], tiles: Tiles) -> Int[Array, "Q"]:
    """The last tile that begins at a row or before it."""
    index = jnp.arange(tiles.start.shape[0], dtype=jnp.int32)
    starts = jnp.where(index < tiles.count.reshape(-1)[0], tiles.start, jnp.int32(2**31 - 1))
    return jnp.maximum(jnp.searchsorted(starts, rows, side="right", method="compare_all").astype(jnp.int32) - 1, 0)


def contract(
    hiddens: tuple[Float[Array, "ranks columns"], ...],
    rows: Float[Array, "Q width"],
    runs: tuple[Runs, ...],
    num_pages: tuple[int, ...],
    num_sms: int | None = None,
) -> tuple[Float[Array, "_pages 16 width"], ...]:
    """For each of `hiddens`, of each page run the sum over its rows of `hidden[:, r] rows[r]`, in float32.

    Pages of no run are not written.

    Args:
      hiddens: `by_rank`'s, one or two of one plan: the rows are read once.
      rows: `[Q, width]`, a width that is a multiple of 64; every value finite.
      runs: the page runs of each of `hiddens`.
      num_pages: pages in the pool of each of `hiddens`.
      num_sms: blocks; those of the target where None.
    """
    num_sms = num_sms or target_sms()
    several, ranks, width = len(hiddens), hiddens[0].shape[0], rows.shape[1]
    wide, stages = COMPUTE_WARPGROUPS * COLUMNS, STAGES if several == 1 else STAGES - 1
    rank_blocks, blocks = ranks // RANKS, pl.cdiv(width, wide)
    items = runs[0].begin.shape[0] * rank_blocks * blocks

    def contract_rows(begin_of, end_of, *refs, **smem):
        of_runs, refs = refs[: 3 * several], refs[3 * several :]
        first_of, pages_of, stop_of = (of_runs[kind::3] for kind in range(3))
        hiddens, rows, outs = refs[:several], refs[several], refs[several + 1 :]
        row_ring, hidden_ring, cleared, out_tile, full, empty = (
            smem[name] for name in ("row_ring", "hidden_ring", "cleared", "out_tile", "full", "empty")
        )
        warpgroup = lax.axis_index("wg")

        def place(number):
            """An item's run, its first page of the run's, how many pages each has from there, and its first column."""
            block, rest = lax.rem(number, jnp.int32(blocks)), lax.div(number, jnp.int32(blocks))
            run, part = lax.div(rest, jnp.int32(rank_blocks)), lax.rem(rest, jnp.int32(rank_blocks))
            first = part * PAGES_A_STEP
            pages = [jnp.clip(count[run] - first, 0, PAGES_A_STEP) for count in pages_of]
            return run, first, pages, block * wide

        def over_windows(run, pages, done, window):
            """`window(row, stage step, begin, end, wanted)` for each 64 rows of each expert that a page run takes.

            `wanted`: for which of the page runs; they can be shared by different experts.
            """
            stops = [jnp.where(own > 0, stop[run], run) for own, stop in zip(pages, stop_of, strict=True)]

            def of_expert(own, done):
                begin, end = begin_of[own], end_of[own]
                first = lax.div(begin, jnp.int32(DEPTH))
                count = jnp.where(end > begin, lax.div(end + (DEPTH - 1), jnp.int32(DEPTH)) - first, 0)
                wanted = [own < stop for stop in stops]

                @pl.loop(0, count)
                def _(index):
                    window(pl.multiple_of((first + index) * DEPTH, DEPTH), done + index, begin, end, wanted)

                return done + count

            return lax.fori_loop(run, functools.reduce(jnp.maximum, stops), of_expert, done)

        @pl.when(warpgroup == COMPUTE_WARPGROUPS)
        def _memory():
            ring.give_registers(COMPUTE_WARPGROUPS)

            def item(number, done):
                run, first, pages, column = place(number)

                def window(row, step, *_):
                    stage = ring.wait_until_empty(empty, step, stages)
                    some = pl.ds(row, DEPTH)
                    for index, hidden in enumerate(hiddens):
                        ranks = pl.ds(first * RANK_PAGE, RANKS)
                        plgpu.copy_gmem_to_smem(hidden.at[ranks, some], hidden_ring.at[stage, index], full.at[stage])
                    for part in range(COMPUTE_WARPGROUPS):
                        columns = pl.ds(column + part * COLUMNS, COLUMNS)
                        plgpu.copy_gmem_to_smem(rows.at[some, columns], row_ring.at[stage, part], full.at[stage])

                return over_windows(run, pages, done, window)

            ring.drain(empty, ring.over_items(jnp.int32(items), num_sms, item), stages)

        @pl.when(warpgroup < COMPUTE_WARPGROUPS)
        def _compute():
            ring.take_registers(COMPUTE_WARPGROUPS)
            numbers = plgpu.broadcasted_iota(jnp.int32, (RANKS, DEPTH), 1, layout=plgpu.Layout.WGMMA)

            def store(total, out, page, pages, column):
                for part in range(COLUMNS // STORED):
                    mine = out_tile.at[warpgroup, part % BUFFERS]
                    plgpu.wait_smem_to_gmem(BUFFERS - 1, wait_read_only=True)
                    mine[...] = total[:, part * STORED : (part + 1) * STORED]
                    plgpu.commit_smem()
                    some = pl.ds(column + part * STORED, STORED)
                    for nth in range(PAGES_A_STEP):

                        @pl.when(nth < pages)
                        def _(nth=nth, mine=mine, some=some):
                            ranks = mine.at[pl.ds(nth * RANK_PAGE, RANK_PAGE)]
                            plgpu.copy_smem_to_gmem(ranks, out.at[page + nth, :, some], commit_group=False)

                    plgpu.commit_smem_to_gmem_group()

            def item(number, done):
                run, first, pages, column = place(number)

                def accumulate(*accs):
                    def window(row, step, begin, end, wanted):
                        stage = ring.stage_of(step, stages)
                        plgpu.barrier_wait(full.at[stage])
                        inside = (begin <= row) & (end >= row + DEPTH)
                        for index, acc in enumerate(accs):
                            hidden = hidden_ring.at[stage, index]

                            @pl.when(inside & wanted[index])
                            def _(acc=acc, hidden=hidden):
                                plgpu.wgmma(acc, hidden, row_ring.at[stage, warpgroup])

                            @pl.when(jnp.logical_not(inside) & wanted[index])
                            def _(acc=acc, hidden=hidden, index=index):
                                mine = (numbers >= begin - row) & (numbers < end - row)
                                own = jnp.where(mine, hidden[...].astype(jnp.float32), 0.0)
                                cleared.at[warpgroup, index][...] = own.astype(dtype)
                                plgpu.commit_smem()
                                plgpu.wgmma(acc, cleared.at[warpgroup, index], row_ring.at[stage, warpgroup])

                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(empty.at[stage])

                    over_windows(run, pages, done, window)
                    return tuple(acc[...] for acc in accs)

                @pl.when(functools.reduce(jnp.maximum, pages) > 0)
                def _():
                    totals = pl.run_scoped(accumulate, *[plgpu.ACC((RANKS, COLUMNS))] * several)
                    for total, out, own, count in zip(totals, outs, first_of, pages, strict=True):
                        store(total, out, own[run] + first, count, column + warpgroup * COLUMNS)

                return over_windows(run, pages, done, lambda *_: None)

            ring.over_items(jnp.int32(items), num_sms, item)
            plgpu.wait_smem_to_gmem(0)

    dtype = rows.dtype
    scratch = {
        "row_ring": ring.tile_smem((stages, COMPUTE_WARPGROUPS, DEPTH, COLUMNS), dtype),
        "hidden_ring": ring.tile_smem((stages, several, RANKS, DEPTH), dtype),
        "cleared": ring.tile_smem((COMPUTE_WARPGROUPS, several, RANKS, DEPTH), dtype),
        "out_tile": ring.row_smem((COMPUTE_WARPGROUPS, BUFFERS, RANKS, STORED), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS + several, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
    }
    out_type = [jax.ShapeDtypeStruct((count, RANK_PAGE, width), jnp.float32) for count in num_pages]
    of_pages = [array for each in runs for array in (each.first, each.pages, each.stop)]
    kernel = ring.run(contract_rows, out_type, scratch, num_sms)
    return tuple(kernel(runs[0].begin, runs[0].end, *of_pages, *hiddens, rows))

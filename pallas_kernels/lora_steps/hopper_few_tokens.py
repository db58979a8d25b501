"""Plan and LoRA steps of at most 8 tokens in one kernel: for a forward pass alone.

A tile has 8 rows however few of them an expert has. So each expert that is hit gets one tile, which reads all tokens as
they are: nothing is sorted or copied, and token t's row of tile n is `8 n + t`. The plan is the list of the experts
hit. Rows of tokens that did not choose the tile's expert are multiplied too, and never read.

A block is one warpgroup. Block 0 writes the plan, each other one lists the steps of one tile for one call of the
matmul. Every block finds the experts hit for itself, by comparing all pairs with all, which takes less time than
waiting for another kernel. An entry belongs to a run of neighbouring tokens of one slot: one range of a tile's rows.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from pallas_kernels import mosaic
from pallas_kernels.hopper import ring
from pallas_kernels.hopper.counting import BLOCK, Comparisons
from pallas_kernels.hopper.limits import ROW_ALIGNMENT
from pallas_kernels.lora_steps.api import LoRASteps, StepLayout
from pallas_kernels.lora_steps.entries import PAGES_A_STEP
from pallas_kernels.lora_steps.hopper import layout_of_runs
from pallas_kernels.pages import LayerPages
from pallas_kernels.plan.api import RoutingPlan
from pallas_kernels.plan.tiles import BASE_SLOT, Tiles

MAX_TOKENS = ROW_ALIGNMENT
MAX_PAIRS = BLOCK
PAIR_EXPERTS, LEADERS, TILES, TILE_EXPERTS, PRESENT = range(5)  # vectors in shared memory
FIRST_A, FIRST_B, COUNT = range(3)  # of a table


def runs(plan: RoutingPlan) -> bool:
    """Whether tokens and pairs are few enough."""
    tokens, top_k = plan.experts.shape
    return 0 < tokens <= MAX_TOKENS and tokens * top_k <= MAX_PAIRS


def plan_and_steps(plan: RoutingPlan, projections: list[LayerPages]) -> tuple[RoutingPlan, list[LoRASteps]]:
    """A plan of the same pairs in which every tile has all tokens, and the steps of each projection's adapters.

    Args:
      plan: as `make_plan` made it; its experts and slots alone are read.
      projections: the adapters of each projection, or of each two that share their input; all have some.
    """
    tokens, top_k = plan.experts.shape
    num_experts, num_slots = plan.segment_sizes.shape[0], plan.segment_sizes.shape[1] - 1
    pairs = tokens * top_k
    num_tiles = min(pairs, num_experts)
    padded = [pages.pad_with_empty_pages() for pages in projections]
    layouts = [layout_of_runs(pages, tokens, by_rows=True) for pages in padded]
    tables = [[(pages.tables[p.module], pages.scales[p.module]) for p in pages.places] for pages in padded]
    made, lists = _run(plan, num_tiles, num_experts, num_slots, tables, layouts)
    position, expert, start, rows, first_rows, count = made
    tiles = Tiles(expert, jnp.full_like(expert, BASE_SLOT), start, rows, count, ROW_ALIGNMENT)
    num_rows = num_tiles * ROW_ALIGNMENT
    few = replace(
        plan,
        order=jnp.full(num_rows, pairs, jnp.int32).at[position[:pairs]].set(jnp.arange(pairs), mode="drop"),
        position=position[:pairs],
        token=jnp.arange(num_rows, dtype=jnp.int32) % ROW_ALIGNMENT,
        tiles=tiles,
        token_tiles=replace(tiles, start=first_rows),
    )
    steps = [
        LoRASteps(
            *arrays,
            bound=pairs * layout.most // PAGES_A_STEP + num_tiles,
            tile_rows=ROW_ALIGNMENT,
            max_steps=-(-tokens * layout.most // PAGES_A_STEP),
            layout=layout,
        )
        for layout, arrays in zip(layouts, lists, strict=True)
    ]
    return few, steps


class _Found(NamedTuple):
    """What a block finds of the tiles, beside what it leaves in shared memory.

    Attributes:
      of_pair: the tile of each pair; of skipped pairs the number of tiles.
      number: of tiles, 64 times.
    """

    of_pair: Int[Array, "64"]
    number: Int[Array, "64"]


def _run(plan, num_tiles, num_experts, num_slots, tables, layouts):
    tokens, top_k = plan.experts.shape
    flat = [array for own in tables for pair in own for array in pair]

    def plan_tokens(experts, slots, *refs):
        table_refs, refs = refs[: len(flat)], refs[len(flat) :]
        (position, *tile_refs, tile_count), outs, facts = refs[:6], refs[6:-1], refs[-1]
        job = lax.axis_index("job")
        compare = Comparisons(-(-tokens * top_k // 8) * 8)
        found = _find_tiles(compare, experts, facts, num_experts)

        @pl.when(job == 0)
        def _():
            token = lax.div(compare.lane, jnp.int32(top_k))
            position[...] = found.of_pair * ROW_ALIGNMENT + token
            used = compare.lane < found.number
            values = compare.rows(facts.at[TILE_EXPERTS]), compare.lane * ROW_ALIGNMENT, tokens
            *of_tiles, first_rows = tile_refs
            for ref, value in zip(of_tiles, values, strict=True):
                ref[...] = jnp.where(used, value, 0)
            first_rows[...] = jnp.where(compare.lane < 0, 1, 0)
            tile_count[...] = found.number

        module = 0
        for number, layout in enumerate(layouts):
            tile = job - 1 - number * num_tiles
            own = table_refs[2 * module : 2 * (module + layout.projections)]
            lists = outs[3 * number : 3 * number + 3]

            @pl.when((tile >= 0) & (tile < num_tiles))
            def _(tile=tile, layout=layout, own=own, lists=lists):
                _list_steps(compare, facts, (experts, slots), tile, layout, own, lists, num_slots)

            module += layout.projections

    vector = jax.ShapeDtypeStruct((BLOCK,), jnp.int32)
    kernel = mosaic.kernel(
        plan_tokens,
        out_type=[vector] * 6
        + [
            jax.ShapeDtypeStruct(shape, jnp.int32)
            for layout in layouts
            for shape in ((num_tiles, BLOCK), (num_tiles, BLOCK), (6, num_tiles, layout.length // BLOCK, BLOCK))
        ],
        grid=(1 + num_tiles * len(layouts),),
        grid_names=("job",),
        scratch_types=(plgpu.SMEM((5, BLOCK), jnp.int32),),
        compiler_params=ring.compiler_params(),
    )
    outs = kernel(plan.experts, plan.slots, *flat)
    triples = [outs[6 + 3 * number :][:3] for number in range(len(layouts))]
    return outs[:6], [(first, count, entries.reshape(6, num_tiles, -1)) for first, count, entries in triples]


def _find_tiles(compare: Comparisons, experts: Any, facts: Any, num_experts: int) -> _Found:
    """Numbers the experts hit, in ascending order; leaves each pair's and each tile's expert in shared memory."""
    tokens, top_k = experts.shape
    own = jnp.where(compare.lane < 0, 0, num_experts)  # skipped, and past the last pair
    for pair in range(tokens * top_k):
        expert = experts[pair // top_k, pair % top_k]
        valid = (expert >= 0) & (expert < num_experts)
        own = jnp.where(compare.lane == pair, jnp.where(valid, expert, num_experts), own)

    def leave(fact, value):
        facts[fact] = value
        plgpu.commit_smem()

    def across(fact):
        return compare.across(facts.at[fact, pl.ds(0, compare.width)])

    leave(PAIR_EXPERTS, own)
    same_before = (across(PAIR_EXPERTS) == compare.down(own)) & (compare.column < compare.row)
    leads = (same_before.astype(jnp.int32).sum(1) == 0) & (own < num_experts)
    leave(LEADERS, jnp.where(leads, own, num_experts))
    tile = (across(LEADERS) < compare.down(own)).astype(jnp.int32).sum(1)
    count = (across(LEADERS) < num_experts).astype(jnp.int32).sum(1)
    leave(TILES, jnp.where(leads, tile, -1))
    of_tile = across(TILES) == compare.row
    leave(TILE_EXPERTS, jnp.where(of_tile, across(PAIR_EXPERTS), 0).sum(1))
    return _Found(tile, count)


def _list_steps(compare, facts, ids, tile, layout, tables, lists, num_slots) -> None:
    """The steps of one tile."""
    experts, slots = ids
    tokens, top_k = experts.shape
    first, count, entries = lists
    expert = facts[TILE_EXPERTS, tile]
    own = (lax.div(compare.column, jnp.int32(top_k)) == compare.row) & (compare.column < tokens * top_k)
    of_pair = compare.across(facts.at[PAIR_EXPERTS, pl.ds(0, compare.width)])
    hit = own & (of_pair == expert)
    facts[PRESENT] = hit.astype(jnp.int32).sum(1)
    plgpu.commit_smem()
    ranges, total = _runs_of_tokens(facts, slots, expert, layout, tables, num_slots)
    steps = lax.div(total + (PAGES_A_STEP - 1), jnp.int32(PAGES_A_STEP))
    count[tile] = jnp.where(compare.lane < BLOCK, steps, 0)
    lower = (of_pair < expert).astype(jnp.int32).sum(1)
    first[tile] = lax.div(lower * layout.most, jnp.int32(PAGES_A_STEP)) + tile

    @pl.loop(0, lax.div(total + (BLOCK - 1), jnp.int32(BLOCK)))
    def _(chunk):
        number = compare.lane + chunk * BLOCK
        for kind, value in enumerate(_fields(number, ranges, layout)):
            entries[kind, tile, chunk] = value


class _Run(NamedTuple):
    """The entries of a run of tokens of one slot: numbers `first .. border - 1` are the first projection's or serve
    both, `border .. end - 1` the second's own. `rows`: of the tile. Of each projection: `pages` (first of A, of B) and
    `scales`.
    """

    first: Array
    border: Array
    end: Array
    rows: tuple[Any, Any]
    pages: list[tuple[Array, Array]]
    scales: list[Array]
    aliased: Any


def _runs_of_tokens(facts, slots, expert, layout, tables, num_slots) -> tuple[list[_Run], Array]:
    """For each token the run that begins with it, empty where none does; and the number of all entries."""
    tokens = slots.shape[0]
    slot = [slots[token] for token in range(tokens)]
    present = [facts[PRESENT, token] for token in range(tokens)]
    ends: list[Any] = [tokens] * tokens
    for token in reversed(range(tokens - 1)):
        same = slot[token] == slot[token + 1]
        present[token] = present[token] + jnp.where(same, present[token + 1], 0)
        ends[token] = jnp.where(same, ends[token + 1], token + 1)
    found, total = [], jnp.int32(0) * expert
    for token in range(tokens):
        begins = (present[token] > 0) & (slot[token] >= 0) & (slot[token] < num_slots)
        if token:
            begins = begins & (slot[token] != slot[token - 1])
        row = jnp.clip(slot[token], 0, num_slots - 1)
        looked_up = [[table[row, expert, kind] for kind in range(3)] for table in tables[::2]]
        scales = [scale[row, expert] for scale in tables[1::2]]
        counts = [jnp.where(begins, own[COUNT], 0) for own in looked_up]
        aliased = False
        if layout.projections == 2 and layout.one_pool:
            one, other = looked_up
            aliased = (one[FIRST_A] == other[FIRST_A]) & (one[COUNT] == other[COUNT]) & (scales[0] == scales[1])
            counts[1] = jnp.where(aliased, 0, counts[1])
        border = total + counts[0]
        end = border + counts[1] if layout.projections == 2 else border
        pages = [(own[FIRST_A], own[FIRST_B]) for own in looked_up]
        found.append(_Run(total, border, end, (token, ends[token]), pages, scales, aliased))
        total = end
    return found, total


def _fields(number: Int[Array, "64"], runs_of_tile: list[_Run], layout: StepLayout) -> tuple[Array, ...]:
    """The six fields of the entries of these numbers (see `entries.py`); zeros past the last."""
    zero = jnp.where(number < 0, 1, 0)
    page_a, page_b, page_b1, begin, end, scale = zero, zero, zero, zero, zero, zero.astype(jnp.float32)
    for run in runs_of_tile:
        own = (number >= run.first) & (number < run.border)
        (a, b), nth = run.pages[0], number - run.first
        page_a, page_b = jnp.where(own, a + nth, page_a), jnp.where(own, b + nth, page_b)
        scale = jnp.where(own, run.scales[0], scale)
        if layout.projections == 1:
            page_b1 = page_b
        else:
            second = (number >= run.border) & (number < run.end)
            (a1, b1), nth1 = run.pages[1], number - run.border
            page_a = jnp.where(second, a1 + nth1 if layout.one_pool else -1 - (a1 + nth1), page_a)
            page_b1 = jnp.where(second, b1 + nth1, page_b1)
            scale = jnp.where(second, run.scales[1], scale)
            if layout.one_pool:
                page_b1 = jnp.where(own & run.aliased, b1 + nth, page_b1)
            own = own | second
        begin, end = (jnp.where(own, row, value) for row, value in zip(run.rows, (begin, end), strict=True))
    return page_a, page_b, page_b1, begin, end, lax.bitcast_convert_type(scale, jnp.int32)

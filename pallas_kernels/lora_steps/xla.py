"""The lists of LoRA steps through XLA, packed: for kernels whose grid is the steps. `api.py` says what a step is."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels.lora_steps.entries import PAGES_A_STEP
from pallas_kernels.pages import RANK_PAGE, LayerPages
from pallas_kernels.plan.api import RoutingPlan
from pallas_kernels.plan.tiles import Tiles
from pallas_kernels.pytrees import pytree


@pytree
@dataclass(frozen=True)
class PackedSteps:
    """The LoRA steps of all tiles. N is a static bound of their number.

    Attributes:
      start: int32 `[tiles + 1]`, first step of each tile.
      entries: int32 `[N * 4, 6]`, a row an entry: its fields as in `LoRASteps.entries`.
    """

    start: Int[Array, "tiles_and_1"]
    entries: Int[Array, "N4 *fields"]

    @property
    def bound(self) -> int:
        """N."""
        return self.entries.shape[0] // PAGES_A_STEP


def make_packed_steps(plan: RoutingPlan, tiles: Tiles, pages: LayerPages) -> PackedSteps:
    """The steps of `tiles` for one projection, or for two that share their input.

    Only where two projections have their pages of A in one pool can a page be one that both alias.
    """
    num_experts, num_slots = plan.segment_sizes.shape[0], plan.segment_sizes.shape[1] - 1
    num_tiles = tiles.expert.shape[0]
    most = len(pages.places) * -(-pages.max_rank // RANK_PAGE)  # entries of one slot in one tile
    runs = min(plan.position.shape[0], num_experts * num_slots + num_tiles)
    bound = num_tiles + -(-runs * most // PAGES_A_STEP)

    begin, end = _slot_rows(plan, tiles)
    present = end > begin

    # [projection, tiles, S]: first page of A and of B, number of pages; scale.
    table = jnp.stack([pages.tables[place.module][:, tiles.expert] for place in pages.places]).swapaxes(1, 2)
    scale = jnp.stack([pages.scales[place.module][:, tiles.expert] for place in pages.places]).swapaxes(1, 2)
    first_a, first_b, count = table[..., 0], table[..., 1], jnp.where(present[None], table[..., 2], 0)
    aliased = jnp.zeros_like(present)
    one_pool, projections = pages.a_in_one_pool, len(pages.places)
    if projections == 2 and one_pool:
        same = (first_a[0] == first_a[1]) & (count[0] == count[1]) & (scale[0] == scale[1])
        aliased = same & (count[0] > 0)
    second = jnp.where(aliased, 0, count[-1]) if projections == 2 else jnp.zeros_like(count[0])
    total = count[0] + second

    steps_of = -(-total.sum(1) // PAGES_A_STEP)
    after = jnp.arange(num_tiles + 1, dtype=jnp.int32)[:, None] > jnp.arange(num_tiles, dtype=jnp.int32)[None]
    start = jnp.where(after, steps_of[None], 0).sum(1, dtype=jnp.int32)
    first = start[:-1, None] * PAGES_A_STEP + jnp.cumsum(total, axis=1) - total

    index = jnp.arange(most, dtype=jnp.int32)[None, None, :]  # [tiles, S, most]
    of_first = index < count[0][..., None]  # the first projection's entry, or one that serves both
    page = jnp.where(of_first, index, index - count[0][..., None])
    last = projections - 1
    page_a = jnp.where(of_first, first_a[0][..., None], first_a[last][..., None]) + page
    if not one_pool:
        page_a = jnp.where(of_first, page_a, ~page_a)
    page_b0 = page_b1 = jnp.where(of_first, first_b[0][..., None] + page, 0)
    if projections == 2:
        page_b1 = jnp.where(~of_first | aliased[..., None], first_b[1][..., None] + page, 0)
    factor = jnp.where(of_first, scale[0][..., None], scale[last][..., None])
    columns = [page_a, page_b0, page_b1, begin[..., None], end[..., None], lax.bitcast_convert_type(factor, jnp.int32)]
    target = jnp.where(index < total[..., None], first[..., None] + index, bound * PAGES_A_STEP)
    return PackedSteps(start, _scatter_rows(columns, target, bound * PAGES_A_STEP))


def _slot_rows(plan: RoutingPlan, tiles: Tiles) -> tuple[Int[Array, "N S"], Int[Array, "N S"]]:
    """First row and end of each slot's rows in each tile, counted from the tile's first row."""
    sizes = plan.segment_sizes[:, :-1]
    starts = plan.group_starts[:, None] + jnp.cumsum(sizes, axis=1) - sizes
    begin = starts[tiles.expert] - tiles.start[:, None]
    end = begin + sizes[tiles.expert]
    return jnp.clip(begin, 0, tiles.rows[:, None]), jnp.clip(end, 0, tiles.rows[:, None])


def _scatter_rows(columns: list[Array], target: Int[Array, "N S most"], count: int) -> Int[Array, "count fields"]:
    """A table of `count` rows, each of the columns' values put where `target` says; outside it, dropped."""
    rows = jnp.stack([jnp.broadcast_to(column, target.shape) for column in columns], -1)
    table = jnp.zeros((count, len(columns)), jnp.int32)
    return table.at[target.reshape(-1)].set(rows.reshape(-1, len(columns)), mode="drop", unique_indices=True)

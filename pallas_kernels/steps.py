"""Which pages each row tile needs: the adapters' work, cut into steps of four pages.

An entry is one page of A with the page(s) of B that belong to it, a run of the tile's rows (those of one slot) and a
scale. Four entries of a tile make a step: 64 ranks, which a kernel multiplies as it multiplies 64 elements of K. The
step's H is `[tile rows, 64]`: each entry's 16 columns hold `scale * x A^T` in its own rows and zeros in all others, so
that `H @ B` adds to each row its own adapter's update and to a base row nothing.

Where two projections share their input (gate and up) an entry serves both if they alias their A, and has the zero page
for the other one if not.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_lora.pages import RANK_PAGE, LoRAPages
from pallas_kernels.plan import RoutingPlan, Tiles

PAGES_A_STEP = 4


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoRASteps:
    """The LoRA steps of all tiles. N is a static bound of their number.

    Attributes:
      start: int32 `[tiles + 1]`, first step of each tile.
      pages_a: int32 `[N * 4]`, each entry's page of A; page p of the second pool is `~p`.
      pages_b: for each projection, int32 `[N * 4]`.
      begin, end: int32 `[N * 4]`, the rows of the tile that the entry is for. scale: float32 `[N * 4]`.
    """

    start: Int[Array, "tiles_and_1"]
    pages_a: Int[Array, "N4"]
    pages_b: tuple[Int[Array, "N4"], ...]
    begin: Int[Array, "N4"]
    end: Int[Array, "N4"]
    scale: Float[Array, "N4"]

    @property
    def bound(self) -> int:
        """N."""
        return self.pages_a.shape[0] // PAGES_A_STEP


def make_steps(plan: RoutingPlan, tiles: Tiles, pages: tuple[LoRAPages, ...]) -> LoRASteps:
    """The steps of `tiles` for one projection, or for two that share their input.

    Two projections have one pool of A where it is the same array (as `AdapterBank.layer` gives it); only there can a
    page be one that both alias.
    """
    sizes = plan.segment_sizes[:, :-1]
    num_experts, num_slots = sizes.shape
    num_tiles = tiles.expert.shape[0]
    most = sum(-(-p.max_rank // RANK_PAGE) for p in pages)  # entries of one slot in one tile
    runs = min(plan.position.shape[0], num_experts * num_slots + num_tiles)
    bound = num_tiles + -(-runs * most // PAGES_A_STEP)

    # Rows of each slot in each tile, as a range within the tile: [tiles, S].
    starts = plan.group_starts[:, None] + jnp.cumsum(sizes, axis=1) - sizes
    begin, size = starts[tiles.expert] - tiles.start[:, None], sizes[tiles.expert]
    begin, end = (jnp.clip(edge, 0, tiles.rows[:, None]) for edge in (begin, begin + size))
    present = end > begin

    # [projection, tiles, S]: first page of A and of B, number of pages; scale.
    table = jnp.stack([p.table[:, tiles.expert] for p in pages]).swapaxes(1, 2)
    scale = jnp.stack([p.scale[:, tiles.expert] for p in pages]).swapaxes(1, 2)
    first_a, first_b, count = table[..., 0], table[..., 1], jnp.where(present[None], table[..., 2], 0)
    aliased = jnp.zeros_like(present)
    one_pool = pages[0].a is pages[-1].a
    if len(pages) == 2 and one_pool:
        same = (first_a[0] == first_a[1]) & (count[0] == count[1]) & (scale[0] == scale[1])
        aliased = same & (count[0] > 0)
    second = jnp.where(aliased, 0, count[-1]) if len(pages) == 2 else jnp.zeros_like(count[0])
    total = count[0] + second

    steps_of = -(-total.sum(1) // PAGES_A_STEP)
    start = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(steps_of)])
    first = start[:-1, None] * PAGES_A_STEP + jnp.cumsum(total, axis=1) - total

    index = jnp.arange(most, dtype=jnp.int32)[None, None, :]  # [tiles, S, most]
    own = index < count[0][..., None]  # the first projection's entry, or one that serves both
    page = jnp.where(own, index, index - count[0][..., None])
    last = len(pages) - 1
    page_a = jnp.where(own, first_a[0][..., None], first_a[last][..., None]) + page
    if not one_pool:
        page_a = jnp.where(own, page_a, ~page_a)
    pages_b = [jnp.where(own, first_b[0][..., None] + page, 0)]
    if len(pages) == 2:
        serves_second = ~own | aliased[..., None]
        pages_b.append(jnp.where(serves_second, first_b[1][..., None] + page, 0))
    factor = jnp.where(own, scale[0][..., None], scale[last][..., None])
    target = jnp.where(index < total[..., None], first[..., None] + index, bound * PAGES_A_STEP)

    def spread(values: Array) -> Array:
        return jnp.broadcast_to(values, target.shape)

    columns = [page_a, *pages_b, spread(begin[..., None]), spread(end[..., None]), factor]
    columns[-1] = jax.lax.bitcast_convert_type(columns[-1], jnp.int32)
    entries = jnp.zeros((bound * PAGES_A_STEP, len(columns)), jnp.int32)
    entries = entries.at[target.reshape(-1)].set(
        jnp.stack(columns, -1).reshape(-1, len(columns)), mode="drop", unique_indices=True
    )
    page_a, *rest = (entries[:, i] for i in range(len(columns)))
    *pages_b, begins, ends, bits = rest
    return LoRASteps(
        start.astype(jnp.int32), page_a, tuple(pages_b), begins, ends, jax.lax.bitcast_convert_type(bits, jnp.float32)
    )

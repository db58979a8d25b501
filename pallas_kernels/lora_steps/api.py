"""Which pages each row tile needs: the adapters' work, cut into steps of four pages.

An entry is one page of A with the page(s) of B that belong to it, a run of the tile's rows (those of one slot) and a
scale. Four entries of a tile make a step: 64 ranks, which a kernel multiplies as it multiplies 64 elements of K. The
step's H is `[tile rows, 64]`: each entry's 16 columns hold `scale * x A^T` in its own rows and zeros in the others that
the tile has (beyond them anything), so that `H @ B` adds to each row its own adapter's update and to a base row
nothing.

Where two projections share their input (gate and up) an entry serves both if they alias their A, and has the zero page
for the other one if not.

Where a tile's H lies follows from the tile alone: from the runs that can come before it, not from those that do. So no
tile waits for another, and a tile's list is one warpgroup's work (`hopper.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.lora_steps import hopper
from pallas_kernels.lora_steps.entries import BEGIN, PAGE_A, PAGE_B0, PAGE_B1, PAGES_A_STEP
from pallas_kernels.lora_steps.hopper import BLOCK, StepsOf
from pallas_kernels.pages import RANK_PAGE, LoRAPages
from pallas_kernels.plan.api import RoutingPlan, Tiles, max_tiles


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoRASteps:
    """The LoRA steps of all tiles.

    Attributes:
      first, count: int32 `[N, 64]`, the number of each tile's first step and how many it has (64 times the same).
      entries: int32 `[6, N, J]`, the fields of each tile's entries (`entries.PAGE_A` and so on): page of A (page p
        of the second pool is `~p`), page of B for the first projection and for the last, first row and end of the run
        of the tile's rows, bits of the scale.
      bound: static; all steps have lower numbers.
      tile_rows, max_steps: static, of one tile. of: static, how they are cut.
    """

    first: Int[Array, "N 64"]
    count: Int[Array, "N 64"]
    entries: Int[Array, "fields N J"]
    bound: int = field(metadata={"static": True})
    tile_rows: int = field(metadata={"static": True})
    max_steps: int = field(metadata={"static": True})
    of: StepsOf = field(metadata={"static": True})

    def transposed(self, part: int = 0) -> "LoRASteps":
        """The same steps for one of the projections, transposed: its pages of A and of B change places.

        Entries of the other projection alone get the zero page on both sides.
        """
        page_a, page_b = self.entries[PAGE_A], self.entries[(PAGE_B0, PAGE_B1)[part]]
        page_a = jnp.where(page_b > 0, jnp.where(page_a < 0, ~page_a, page_a), 0)
        entries = jnp.stack([page_b, page_a, page_a, *self.entries[BEGIN:]])
        return replace(self, entries=entries, of=replace(self.of, projections=1, one_pool=True))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shrunk:
    """What the adapters' shrink made of the rows of a projection, or of two that share them.

    Attributes:
      hidden: `[N, tile rows, 64]`, H of each of the steps; rows that a tile does not have may hold anything.
    """

    steps: LoRASteps
    hidden: Float[Array, "N rows 64"]


Adapters = tuple[LoRAPages | None, ...]
"""The adapters of one projection, or of two that share their input."""


def make_steps(
    plan: RoutingPlan, projections: Sequence[Adapters], tiles: Tiles | None = None
) -> list[LoRASteps | None]:
    """The steps of the plan's tiles for several projections, in one kernel.

    Args:
      plan: made for Hopper.
      projections: for each its adapters, or those of two that share their input; None for a weight without. Two have
        one pool of A where it is the same array (as `AdapterBank.layer` gives it); only there can a page be one that
        both alias.
      tiles: others than the plan's.

    Returns:
      For each projection its steps, None for one without adapters.
    """
    tiles = plan.tiles if tiles is None else tiles
    num_experts, segments = plan.segment_sizes.shape
    num_slots, pairs = segments - 1, plan.position.shape[0]
    num_tiles = max_tiles(pairs, num_experts, tiles.size)  # the table may be longer
    complete = [with_nothing(own) for own in projections if any(pages is not None for pages in own)]
    if not complete:
        return [None] * len(projections)
    cut = [steps_of(plan, pages, tiles.size) for pages in complete]
    packed = _packed([own for pages in complete for own in pages])
    lists = hopper.lists(tiles, plan.group_starts, plan.before, packed, num_slots, tuple(cut))
    runs = pairs if cut[0].by_rows else num_experts * num_slots + num_tiles
    made = iter(
        LoRASteps(
            *arrays,
            bound=runs * of.most // PAGES_A_STEP + num_tiles,
            tile_rows=tiles.size,
            max_steps=-(-min(num_slots, tiles.size) * of.most // PAGES_A_STEP),
            of=of,
        )
        for of, arrays in zip(cut, lists, strict=True)
    )
    return [next(made) if any(pages is not None for pages in own) else None for own in projections]


def steps_of(plan: RoutingPlan, pages: tuple[LoRAPages, ...], tile_rows: int) -> StepsOf:
    """How the steps of these adapters are cut, from static sizes and from whether two share a pool of A."""
    num_experts, segments = plan.segment_sizes.shape
    most = sum(-(-own.max_rank // RANK_PAGE) for own in pages)  # entries of one slot in one tile
    length = -(-min(segments - 1, tile_rows) * most // BLOCK) * BLOCK
    by_rows = plan.position.shape[0] < num_experts * (segments - 1)
    return StepsOf(len(pages), pages[0].a is pages[-1].a, most, length, by_rows)


def with_nothing(adapters: Adapters) -> tuple[LoRAPages, ...]:
    """The adapters, where a projection without any has the other one's pools and no slot in use."""
    other = next(pages for pages in adapters if pages is not None)
    return tuple(other.without_slots() if pages is None else pages for pages in adapters)


def _packed(projections: list[LoRAPages]) -> Int[Array, "M E 4 C 64"]:
    """Tables and scales, slots last: first page of A, of B, number of pages, bits of the scale."""
    tables = jnp.stack([own.table[..., :3] for own in projections])
    scales = jnp.stack([lax.bitcast_convert_type(own.scale, jnp.int32) for own in projections])
    every = jnp.concatenate([tables, scales[..., None]], -1)
    slots = every.shape[1]
    chunks = -(-slots // BLOCK)
    padded = jnp.pad(every.transpose(0, 2, 3, 1), ((0, 0), (0, 0), (0, 0), (0, chunks * BLOCK - slots)))
    return padded.reshape(*padded.shape[:3], chunks, BLOCK)

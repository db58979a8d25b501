"""The lists of LoRA steps on Hopper: adapters' tables packed, then one kernel for all projections of a layer."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels.lora_steps.api import LoRASteps, StepLayout, has_adapters
from pallas_kernels.lora_steps.entries import PAGES_A_STEP
from pallas_kernels.lora_steps.hopper_kernel import BLOCK, lists
from pallas_kernels.pages import RANK_PAGE, LayerPages
from pallas_kernels.plan.api import RoutingPlan
from pallas_kernels.plan.tiles import Tiles, max_tiles


def make_lora_steps(
    plan: RoutingPlan, projections: Sequence[LayerPages | None], tiles: Tiles | None = None
) -> list[LoRASteps | None]:
    """What `api.make_lora_steps` promises."""
    tiles = plan.tiles if tiles is None else tiles
    num_experts, segments = plan.segment_sizes.shape
    num_slots, pairs = segments - 1, plan.position.shape[0]
    num_tiles = max_tiles(pairs, num_experts, tiles.size)  # the table may be longer
    with_adapters = [pages.pad_with_empty_pages() for pages in projections if has_adapters(pages)]
    if not with_adapters:
        return [None] * len(projections)
    layouts = [layout_of(plan, pages, tiles.size) for pages in with_adapters]
    made = lists(tiles, plan.group_starts, plan.before, _packed(with_adapters), num_slots, tuple(layouts))
    runs = pairs if layouts[0].by_rows else num_experts * num_slots + num_tiles
    steps = iter(
        LoRASteps(
            *arrays,
            bound=runs * layout.most // PAGES_A_STEP + num_tiles,
            tile_rows=tiles.size,
            max_steps=-(-min(num_slots, tiles.size) * layout.most // PAGES_A_STEP),
            layout=layout,
        )
        for layout, arrays in zip(layouts, made, strict=True)
    )
    return [next(steps) if has_adapters(pages) else None for pages in projections]


def layout_of(plan: RoutingPlan, pages: LayerPages, tile_rows: int) -> StepLayout:
    """How the steps of these adapters are cut, from static sizes and from whether two share a pool of A."""
    if plan.token_tiles is not None:
        return layout_of_runs(pages, plan.slots.shape[0], by_rows=True)
    num_experts, segments = plan.segment_sizes.shape
    by_rows = plan.position.shape[0] < num_experts * (segments - 1)
    return layout_of_runs(pages, min(segments - 1, tile_rows), by_rows)


def layout_of_runs(pages: LayerPages, runs: int, by_rows: bool) -> StepLayout:
    """How the steps are cut where a tile has at most so many runs, each of rows of one slot."""
    most = len(pages.places) * -(-pages.max_rank // RANK_PAGE)  # entries of one run
    length = -(-runs * most // BLOCK) * BLOCK
    return StepLayout(len(pages.places), pages.a_in_one_pool, most, length, by_rows)


def _packed(projections: list[LayerPages]) -> Int[Array, "M E 4 C 64"]:
    """Tables and scales, slots last: first page of A, of B, number of pages, bits of the scale."""
    modules = [(pages, place.module) for pages in projections for place in pages.places]
    tables = jnp.stack([pages.tables[module][..., :3] for pages, module in modules])
    scales = jnp.stack([lax.bitcast_convert_type(pages.scales[module], jnp.int32) for pages, module in modules])
    packed = jnp.concatenate([tables, scales[..., None]], -1)
    slots = packed.shape[1]
    chunks = -(-slots // BLOCK)
    padded = jnp.pad(packed.transpose(0, 2, 3, 1), ((0, 0), (0, 0), (0, 0), (0, chunks * BLOCK - slots)))
    return padded.reshape(*padded.shape[:3], chunks, BLOCK)

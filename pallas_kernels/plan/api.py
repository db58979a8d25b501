"""The routing plan: from expert ids and adapter slots to sorted rows, groups and tiles, on the device.

Everything after the router reads this plan, so nothing is sorted twice in a layer. Letters: T tokens, K experts per
token, P = T*K routed rows, E experts, S adapter slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.backend import Implementation, Operand, backend_named, choose
from pallas_kernels.plan.tiles import BASE_SLOT, Pairs, Places, RowLayout, Tiles, cut_segments
from pallas_kernels.pytrees import pytree
from pallas_kernels.quantised.format import Format


@pytree
@dataclass(frozen=True)
class RoutingPlan:
    """Rows sorted by (expert, slot); base rows last within their expert, skipped rows last of all.

    Each expert's first row is a multiple of the plan's alignment, so there are `Q >= P` sorted rows; the rows between
    two experts belong to no pair and to no tile.

    Attributes:
      order: int32 `[Q]`, sorted row -> pair, where pair `t * K + k` is token t with its k-th expert; P between experts.
      position: int32 `[P]`, pair -> sorted row: the inverse of `order`.
      token: int32 `[Q]`, sorted row -> token; 0 between experts.
      group_sizes: int32 `[E]`, rows of each expert.
      group_starts: int32 `[E]`, first row of each expert.
      segment_sizes: int32 `[E, S + 1]`, rows of each expert with each slot; base rows last.
      before: int32, for each (expert, slot) in this order the pairs of lower ones: `before[e * (S + 1) + s]`; 64 more
        than these can be read.
      tiles: tiles of one expert each, for the base weights.
      lora_tiles: tiles of one (expert, slot) each, for the adapters; rows without an adapter are in none.
      experts: int32 `[T, K]`, expert of each pair as it was given; a pair outside `0 .. E - 1` is skipped.
      slots: int32 `[T]`, slot of each token as it was given; a token outside `0 .. S - 1` has no adapter.
      token_tiles: None but in the plans of `forward_plan_and_steps`: there `tiles` with a first row of x in place of a
        first sorted row. Every tile has all tokens in their order, whether or not they chose its expert: token t's row
        is the tile's first row plus t. Sizes, starts, segments and `before` are those of the plan it was made of.
      alignment: static, of each expert's first row.
      backend: static, the backend that the plan was made for.
    """

    order: Int[Array, "Q"]
    position: Int[Array, "P"]
    token: Int[Array, "Q"]
    group_sizes: Int[Array, "E"]
    group_starts: Int[Array, "E"]
    segment_sizes: Int[Array, "E segments"]
    before: Int[Array, "before"]
    tiles: Tiles
    lora_tiles: Tiles
    experts: Int[Array, "T K"]
    slots: Int[Array, "T"]
    alignment: int = field(metadata={"static": True})
    backend: Implementation = field(metadata={"static": True})
    token_tiles: Tiles | None = None


def make_plan(
    experts: Int[Array, "T K"],
    slots: Int[Array, "T"],
    num_experts: int,
    num_slots: int,
    implementation: Implementation | None = None,
    rows_per_tile: int | None = None,
    *,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    operands: Sequence[Operand] = (),
    widths: Sequence[int] = (),
) -> RoutingPlan:
    """Sorts the routed rows and cuts them into tiles.

    Args:
      experts: `[T, K]`, expert of each pair. A pair whose expert is outside `0 .. num_experts - 1` (a padding row,
        say) is skipped: no tile covers it.
      slots: `[T]`, adapter slot of each token; anything outside `0 .. num_slots - 1` means no adapter.
      num_experts: E.
      num_slots: S. With S = 0 there are no LoRA tiles.
      implementation: the backend that will read the plan; None picks as `choose` does, by what follows.
      rows_per_tile: another tile size than the backend's.
      dtype: of the rows that the plan is for.
      operands: dtypes of weights and pages, and the formats of quantised weights.
      widths: of the rows, in and out.

    Returns:
      The plan. All shapes follow from T, K, E, S, the backend and its tuned file alone.

    Raises:
      UnsupportedImplementation: no backend has that name.
    """
    if implementation is None:
        implementation = choose(dtype=dtype, operands=operands, widths=widths, slots=num_slots).picked
    backend = backend_named(implementation)
    tokens, top_k = experts.shape
    count = tokens * top_k
    expert = _ids(experts.reshape(count), num_experts)
    slot_of_token = _ids(slots, num_slots)
    slot = jnp.repeat(slot_of_token, top_k)
    # One integer sorts by expert, then slot; `num_slots` (no adapter) comes last within an expert.
    pairs = Pairs(expert, slot_of_token, expert * (num_slots + 1) + slot, num_experts, num_slots)
    module = backend.module("plan")
    formats = [operand for operand in operands if isinstance(operand, Format)]
    cut: RowLayout = module.layout(count, num_experts, rows_per_tile, formats)
    places: Places = module.places(pairs, cut)
    bound = -(-(count + (cut.alignment - 1) * cut.gaps) // cut.alignment) * cut.alignment
    index = jnp.arange(count, dtype=jnp.int32)
    order = jnp.full(bound, count, jnp.int32).at[places.position].set(index, unique_indices=True)
    return RoutingPlan(
        order=order,
        position=places.position,
        token=jnp.where(order < count, order // top_k, 0),
        group_sizes=places.sizes,
        group_starts=places.starts,
        segment_sizes=places.segments,
        before=places.before,
        tiles=places.tiles,
        lora_tiles=cut_segments(places.segments, places.starts, count),
        experts=_narrow(experts, num_experts),
        slots=_narrow(slots, num_slots),
        alignment=cut.alignment,
        backend=backend.name,
    )


def _ids(ids: Int[Array, "*shape"], count: int) -> Int[Array, "*shape"]:
    """The ids as int32, and `count` for all outside `0 .. count - 1`, whatever the integers' width."""
    wide = ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids
    return jnp.where((wide >= 0) & (wide < count), wide, count).astype(jnp.int32)


def _narrow(ids: Int[Array, "*shape"], count: int) -> Int[Array, "*shape"]:
    """The ids as int32: as they are where they can be, so that nothing runs before the kernel that reads them."""
    return ids if ids.dtype == jnp.int32 else _ids(ids, count)


def row_experts(plan: RoutingPlan) -> Int[Array, "Q"]:
    """Expert of each sorted row; E for rows that the plan skips or that lie between experts."""
    rows = jnp.arange(plan.order.shape[0])
    expert = jnp.searchsorted(plan.group_starts, rows, side="right").astype(jnp.int32) - 1
    # Experts without rows begin where the next one does, and `right` finds the last of these: the one with rows.
    inside = rows < (plan.group_starts + plan.group_sizes)[expert]
    return jnp.where(inside, expert, plan.group_sizes.shape[0])


def row_slots(plan: RoutingPlan) -> Int[Array, "Q"]:
    """Slot of each sorted row; `BASE_SLOT` for rows without an adapter."""
    rows = jnp.arange(plan.order.shape[0])[:, None]
    tiles = plan.lora_tiles
    inside = (rows >= tiles.start[None]) & (rows < (tiles.start + tiles.rows)[None])
    return jnp.where(inside, tiles.slot[None], BASE_SLOT).max(1, initial=BASE_SLOT).astype(jnp.int32)

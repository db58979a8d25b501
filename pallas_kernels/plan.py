"""The routing plan: from expert ids and adapter slots to sorted rows, groups and tiles, on the device.

Everything after the router reads this plan, so nothing is sorted twice in a layer. Letters: T tokens, K experts a
token, P = T*K routed rows, E experts, S adapter slots.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

BASE_SLOT = -1
MAX_TILE_ROWS = 128
MIN_TILE_ROWS = 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tiles:
    """Runs of sorted rows that belong together: `count` tiles of at most `size` rows, the rest of the table empty.

    Attributes:
      expert, slot, start, rows: int32 `[N]`. Tile i covers sorted rows `start[i] .. start[i] + rows[i]`, all of one
        expert; all of one slot too in a table of LoRA tiles (elsewhere `slot` is `BASE_SLOT`).
      count: int32 scalar, tiles in use. size: static, rows that a tile can hold.
    """

    expert: Int[Array, "N"]
    slot: Int[Array, "N"]
    start: Int[Array, "N"]
    rows: Int[Array, "N"]
    count: Int[Array, ""]
    size: int = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RoutingPlan:
    """Rows sorted by (expert, slot); base rows last within their expert, skipped rows last of all.

    Attributes:
      order: int32 `[P]`, sorted row -> pair, where pair `t * K + k` is token t with its k-th expert.
      position: int32 `[P]`, pair -> sorted row: the inverse of `order`.
      token: int32 `[P]`, sorted row -> token.
      group_sizes: int32 `[E]`, rows of each expert.
      tiles: tiles of one expert each, for the base weights.
      lora_tiles: tiles of one (expert, slot) each, for the adapters; rows without an adapter are in none.
    """

    order: Int[Array, "P"]
    position: Int[Array, "P"]
    token: Int[Array, "P"]
    group_sizes: Int[Array, "E"]
    tiles: Tiles
    lora_tiles: Tiles


def make_plan(experts: Int[Array, "T K"], slots: Int[Array, "T"], num_experts: int, num_slots: int) -> RoutingPlan:
    """Sorts the routed rows and cuts them into tiles.

    Args:
      experts: `[T, K]`, expert of each pair. A pair whose expert is outside `0 .. num_experts - 1` (a padding row,
        say) is skipped: no tile covers it and grouped ops give zeros for it.
      slots: `[T]`, adapter slot of each token; anything outside `0 .. num_slots - 1` means no adapter.
      num_experts, num_slots: E and S. With S = 0 there are no LoRA tiles.

    Returns:
      The plan. All shapes follow from T, K, E and S alone.
    """
    tokens, top_k = experts.shape
    rows = tokens * top_k
    expert = _ids(experts.reshape(rows), num_experts)
    slot = jnp.repeat(_ids(slots, num_slots), top_k)
    # One integer sorts by expert, then slot; `num_slots` (no adapter) comes last within an expert.
    key = expert * (num_slots + 1) + slot
    order = jnp.argsort(key, stable=True).astype(jnp.int32)
    position = jnp.zeros(rows, jnp.int32).at[order].set(jnp.arange(rows, dtype=jnp.int32))

    segments = jnp.zeros((num_experts + 1) * (num_slots + 1), jnp.int32).at[key].add(1)
    segments = segments.reshape(num_experts + 1, num_slots + 1)[:num_experts]
    group_sizes = segments.sum(1)
    return RoutingPlan(
        order=order,
        position=position,
        token=order // top_k,
        group_sizes=group_sizes,
        tiles=_expert_tiles(group_sizes, rows),
        lora_tiles=_lora_tiles(segments, rows),
    )


def _ids(ids: Int[Array, "N"], count: int) -> Int[Array, "N"]:
    """The ids as int32, and `count` for all outside `0 .. count - 1`, whatever the integers' width."""
    wide = ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids
    return jnp.where((wide >= 0) & (wide < count), wide, count).astype(jnp.int32)


def tile_rows(rows: int, groups: int) -> int:
    """Rows a tile holds: near the mean group, a power of two; from static sizes alone."""
    mean = -(-rows // max(groups, 1))
    return min(max(MIN_TILE_ROWS, 1 << (mean - 1).bit_length()), MAX_TILE_ROWS, max(rows, 1))


def _expert_tiles(group_sizes: Int[Array, "E"], rows: int) -> Tiles:
    num_experts = group_sizes.shape[0]
    group, start, used, count, size = _cut(group_sizes, _offsets(group_sizes), rows)
    expert = jnp.minimum(group, num_experts - 1)
    return Tiles(expert, jnp.full_like(group, BASE_SLOT), start, used, count, size)


def _lora_tiles(segments: Int[Array, "E segments"], rows: int) -> Tiles:
    num_experts, num_slots = segments.shape[0], segments.shape[1] - 1
    if num_slots == 0:
        none = jnp.zeros(0, jnp.int32)
        return Tiles(none, none, none, none, jnp.int32(0), tile_rows(rows, num_experts))
    offsets = _offsets(segments.reshape(-1)).reshape(segments.shape)[:, :num_slots]
    sizes = segments[:, :num_slots]  # the last column is base rows: nothing to do
    segment, start, used, count, size = _cut(sizes.reshape(-1), offsets.reshape(-1), rows)
    segment = jnp.minimum(segment, num_experts * num_slots - 1)
    return Tiles(segment // num_slots, segment % num_slots, start, used, count, size)


def _offsets(sizes: Int[Array, "G"]) -> Int[Array, "G"]:
    return jnp.cumsum(sizes) - sizes


def _cut(sizes: Int[Array, "G"], offsets: Int[Array, "G"], rows: int):
    """Cuts each group into tiles: `(group [N], start [N], rows [N], count [], tile size)`, N a static bound."""
    groups = sizes.shape[0]
    size = tile_rows(rows, groups)
    bound = rows // size + min(rows, groups)
    tiles_of_group = -(-sizes // size)
    count = tiles_of_group.sum()
    index = jnp.arange(bound, dtype=jnp.int32)
    group = jnp.repeat(jnp.arange(groups, dtype=jnp.int32), tiles_of_group, total_repeat_length=bound)
    within = (index - _offsets(tiles_of_group)[group]) * size
    live = index < count
    start = jnp.where(live, offsets[group] + within, 0)
    used = jnp.where(live, jnp.minimum(size, sizes[group] - within), 0)
    return group, start, used, count, size


def row_experts(plan: RoutingPlan) -> Int[Array, "P"]:
    """Expert of each sorted row; E for rows that the plan skips."""
    ends = jnp.cumsum(plan.group_sizes)
    return jnp.searchsorted(ends, jnp.arange(plan.order.shape[0]), side="right").astype(jnp.int32)


def row_slots(plan: RoutingPlan) -> Int[Array, "P"]:
    """Slot of each sorted row; `BASE_SLOT` for rows without an adapter."""
    rows = jnp.arange(plan.order.shape[0])[:, None]
    tiles = plan.lora_tiles
    inside = (rows >= tiles.start[None]) & (rows < (tiles.start + tiles.rows)[None])
    return jnp.where(inside, tiles.slot[None], BASE_SLOT).max(1, initial=BASE_SLOT).astype(jnp.int32)

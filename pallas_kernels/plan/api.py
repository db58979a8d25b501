"""The routing plan: from expert ids and adapter slots to sorted rows, groups and tiles, on the device.

Everything after the router reads this plan, so nothing is sorted twice in a layer. Letters: T tokens, K experts a
token, P = T*K routed rows, E experts, S adapter slots.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.backend import Implementation
from pallas_kernels.hopper import tuning
from pallas_kernels.hopper.counting import Places, group_start
from pallas_kernels.hopper.ring import ROW_ALIGNMENT
from pallas_kernels.plan import hopper_few_pairs, hopper_many_pairs
from pallas_kernels.portable import tuning as portable_tuning
from pallas_kernels.pytrees import pytree

BASE_SLOT = -1
MAX_TILE_ROWS = 128
MIN_TILE_ROWS = 8
READABLE = 64  # entries past the end of `before`
PAIRWISE = 2048  # pairs up to which ranks by comparing all with all are faster than a sort


@pytree
@dataclass(frozen=True)
class Tiles:
    """Runs of sorted rows that belong together: `count` tiles of at most `size` rows, the rest of the table empty.

    Attributes:
      expert, slot, start, rows: int32 `[N]`. Tile i covers sorted rows `start[i] .. start[i] + rows[i]`, all of one
        expert; all of one slot too in a table of LoRA tiles (elsewhere `slot` is `BASE_SLOT`).
      count: int32, tiles in use: a scalar, or a vector whose first value it is.
      size: static, rows that a tile can hold.
    """

    expert: Int[Array, "N"]
    slot: Int[Array, "N"]
    start: Int[Array, "N"]
    rows: Int[Array, "N"]
    count: Int[Array, "*vector"]
    size: int = field(metadata={"static": True})


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
      group_sizes, group_starts: int32 `[E]`, rows of each expert, and its first row.
      segment_sizes: int32 `[E, S + 1]`, rows of each expert with each slot; base rows last.
      before: int32, for each (expert, slot) in this order the pairs of lower ones: `before[e * (S + 1) + s]`; 64 more
        than these can be read.
      tiles: tiles of one expert each, for the base weights.
      lora_tiles: tiles of one (expert, slot) each, for the adapters; rows without an adapter are in none.
      alignment: static.
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
    alignment: int = field(metadata={"static": True})


def make_plan(
    experts: Int[Array, "T K"],
    slots: Int[Array, "T"],
    num_experts: int,
    num_slots: int,
    implementation: Implementation = "xla",
    rows_per_tile: int | None = None,
) -> RoutingPlan:
    """Sorts the routed rows and cuts them into tiles.

    Args:
      experts: `[T, K]`, expert of each pair. A pair whose expert is outside `0 .. num_experts - 1` (a padding row,
        say) is skipped: no tile covers it.
      slots: `[T]`, adapter slot of each token; anything outside `0 .. num_slots - 1` means no adapter.
      num_experts, num_slots: E and S. With S = 0 there are no LoRA tiles.
      implementation: the backend that will read the plan: it decides alignment and tile size.
      rows_per_tile: another tile size than the backend's.

    Returns:
      The plan. All shapes follow from T, K, E, S, the backend and its tuned file alone.
    """
    tokens, top_k = experts.shape
    pairs = tokens * top_k
    expert = _ids(experts.reshape(pairs), num_experts)
    slot_of_token = _ids(slots, num_slots)
    slot = jnp.repeat(slot_of_token, top_k)
    # One integer sorts by expert, then slot; `num_slots` (no adapter) comes last within an expert.
    key = expert * (num_slots + 1) + slot
    alignment, size = _alignment_and_tile(implementation, pairs, num_experts, rows_per_tile)
    hopper = implementation == "hopper"
    if hopper and hopper_few_pairs.runs(pairs, num_experts, num_slots):
        places = _places_by_kernel(key, num_experts, num_slots, alignment, size)
    elif hopper and hopper_many_pairs.runs(pairs, num_experts) and hopper_many_pairs.runs(tokens, num_slots):
        places = _places_by_counting(expert, slot_of_token, key, num_experts, num_slots, alignment, size)
    else:
        places = _places_by_xla(expert, key, num_experts, num_slots, alignment, size, hopper)
    gaps = num_experts + 1 if hopper else min(num_experts, pairs)
    bound = -(-(pairs + (alignment - 1) * gaps) // alignment) * alignment
    index = jnp.arange(pairs, dtype=jnp.int32)
    order = jnp.full(bound, pairs, jnp.int32).at[places.position].set(index, unique_indices=True)
    return RoutingPlan(
        order=order,
        position=places.position,
        token=jnp.where(order < pairs, order // top_k, 0),
        group_sizes=places.sizes,
        group_starts=places.starts,
        segment_sizes=places.segments,
        before=places.before,
        tiles=places.tiles,
        lora_tiles=_lora_tiles(places.segments, places.starts, pairs),
        alignment=alignment,
    )


def _alignment_and_tile(
    implementation: Implementation, pairs: int, num_experts: int, rows_per_tile: int | None
) -> tuple[int, int]:
    """What a backend aligns experts to, and the rows of its tiles."""
    if implementation == "hopper":
        return ROW_ALIGNMENT, rows_per_tile or tuning.tile_rows(pairs, num_experts)
    if implementation == "portable":  # reads and writes whole tiles
        size = rows_per_tile or portable_tuning.tile_rows(pairs, num_experts)
        return size, size
    return 1, rows_per_tile or tile_rows(pairs, num_experts)


class _Places(NamedTuple):
    """The fields of a plan of these names; `sizes`, `starts` and `segments` are its group and segment sizes."""

    position: Int[Array, "P"]
    sizes: Int[Array, "E"]
    starts: Int[Array, "E"]
    segments: Int[Array, "E segments"]
    before: Int[Array, "before"]
    tiles: Tiles


def _places_by_kernel(key: Int[Array, "P"], num_experts: int, num_slots: int, alignment: int, size: int) -> _Places:
    pairs = key.shape[0]
    unique = key * pairs + jnp.arange(pairs, dtype=jnp.int32)
    bound = max_tiles(pairs, num_experts, size)
    found, before = hopper_few_pairs.places_and_tiles(unique, num_slots + 1, num_experts, alignment, size, bound)
    bounds = before[: num_experts * (num_slots + 1) + 1]
    segments = (bounds[1:] - bounds[:-1]).reshape(num_experts, num_slots + 1)
    return _Places(found.position, found.sizes, found.starts, segments, before, _tiles(found, size))


def _places_by_counting(
    expert: Int[Array, "P"],
    slot: Int[Array, "T"],
    key: Int[Array, "P"],
    num_experts: int,
    num_slots: int,
    alignment: int,
    size: int,
) -> _Places:
    pairs, tokens = expert.shape[0], slot.shape[0]
    by_slot = None
    if num_slots:  # tokens sorted by slot, then their pairs by expert
        by_slot = hopper_many_pairs.places(slot, num_slots).position
        token_of = jnp.zeros(tokens, jnp.int32).at[by_slot].set(jnp.arange(tokens), unique_indices=True)
        expert = expert.reshape(tokens, -1)[token_of].reshape(pairs)
    bound = max_tiles(pairs, num_experts, size)
    found = hopper_many_pairs.places(expert, num_experts, alignment, size, bound)
    position, segments = found.position, found.sizes[:, None]
    if num_slots:
        position = position.reshape(tokens, -1)[by_slot].reshape(pairs)
        segments = jnp.zeros((num_experts + 1) * (num_slots + 1), jnp.int32).at[key].add(1)
        segments = segments.reshape(num_experts + 1, num_slots + 1)[:num_experts]
    lower = _offsets(found.sizes)
    index = jnp.arange(num_slots + 1)
    of_lower_slots = jnp.where(index[None, :] < index[:, None], segments[:, None, :], 0).sum(2, dtype=jnp.int32)
    routed = jnp.full(READABLE, found.sizes.sum(), jnp.int32)
    before = jnp.concatenate([(lower[:, None] + of_lower_slots).reshape(-1), routed])
    return _Places(position, found.sizes, found.starts, segments, before, _tiles(found, size))


def _tiles(found: Places, size: int) -> Tiles:
    no_slot = jnp.full_like(found.tile_expert, BASE_SLOT)
    return Tiles(found.tile_expert, no_slot, found.tile_start, found.tile_rows, found.tile_count, size)


def _places_by_xla(
    expert: Int[Array, "P"],
    key: Int[Array, "P"],
    num_experts: int,
    num_slots: int,
    alignment: int,
    size: int,
    as_kernel: bool,
) -> _Places:
    """`as_kernel`: experts begin where the plan kernel lets them begin."""
    lower = _count_below(expert, num_experts + 2)  # pairs whose expert is lower, for 0 .. E + 1
    sizes = lower[1:] - lower[:-1]
    experts_and_none = jnp.arange(num_experts + 1, dtype=jnp.int32)
    aligned = -(-sizes // alignment) * alignment
    first = group_start(lower[:-1], experts_and_none, alignment) if as_kernel else _offsets(aligned)
    position = _ranks(key, (num_experts + 1) * (num_slots + 1)) + (first - lower[:-1])[expert]
    sizes, starts = sizes[:num_experts], first[:num_experts]
    segments = jnp.zeros((num_experts + 1) * (num_slots + 1), jnp.int32).at[key].add(1)
    before = _offsets(jnp.pad(segments, (0, READABLE)))
    segments = segments.reshape(num_experts + 1, num_slots + 1)[:num_experts]
    return _Places(position, sizes, starts, segments, before, cut_groups(sizes, starts, key.shape[0], size))


def _ranks(key: Int[Array, "P"], bound: int) -> Int[Array, "P"]:
    """Place of each key in a stable sort."""
    pairs = key.shape[0]
    index = jnp.arange(pairs, dtype=jnp.int32)
    if pairs <= PAIRWISE and bound * pairs < 2**31:
        unique = key * pairs + index
        return (unique[None, :] < unique[:, None]).sum(1, dtype=jnp.int32)
    narrow = key.astype(jnp.uint16) if bound <= 2**16 else key  # half the passes of a radix sort
    order = jnp.argsort(narrow, stable=True).astype(jnp.int32)
    return jnp.zeros(pairs, jnp.int32).at[order].set(index, unique_indices=True)


def _count_below(values: Int[Array, "P"], bound: int) -> Int[Array, "bound"]:
    """How many values are lower than 0, 1, .. bound - 1: comparisons in place of a histogram and its sums."""
    return (values[None, :] < jnp.arange(bound, dtype=jnp.int32)[:, None]).sum(1, dtype=jnp.int32)


def max_tiles(pairs: int, groups: int, size: int) -> int:
    """Tiles that P pairs in so many groups can take."""
    return pairs // size + min(pairs, groups)


def _ids(ids: Int[Array, "N"], count: int) -> Int[Array, "N"]:
    """The ids as int32, and `count` for all outside `0 .. count - 1`, whatever the integers' width."""
    wide = ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids
    return jnp.where((wide >= 0) & (wide < count), wide, count).astype(jnp.int32)


def tile_rows(rows: int, groups: int) -> int:
    """Rows a tile holds: near the mean group, a power of two; from static sizes alone."""
    mean = -(-rows // max(groups, 1))
    return min(max(MIN_TILE_ROWS, 1 << (mean - 1).bit_length()), MAX_TILE_ROWS, max(rows, 1))


def cut_groups(group_sizes: Int[Array, "E"], starts: Int[Array, "E"], pairs: int, size: int) -> Tiles:
    """Tiles of at most `size` rows, each of one expert."""
    expert, start, used, count = _cut(group_sizes, starts, pairs, size)
    return Tiles(expert, jnp.full_like(expert, BASE_SLOT), start, used, count, size)


def _lora_tiles(segments: Int[Array, "E segments"], starts: Int[Array, "E"], pairs: int) -> Tiles:
    num_experts, num_slots = segments.shape[0], segments.shape[1] - 1
    if num_slots == 0:
        none = jnp.zeros(0, jnp.int32)
        return Tiles(none, none, none, none, jnp.int32(0), tile_rows(pairs, num_experts))
    offsets = starts[:, None] + jnp.cumsum(segments, axis=1) - segments
    sizes, offsets = segments[:, :num_slots], offsets[:, :num_slots]  # the last column is base rows: nothing to do
    size = tile_rows(pairs, num_experts * num_slots)
    segment, start, used, count = _cut(sizes.reshape(-1), offsets.reshape(-1), pairs, size)
    return Tiles(segment // num_slots, segment % num_slots, start, used, count, size)


def _offsets(sizes: Int[Array, "G"]) -> Int[Array, "G"]:
    """Sum of the sizes before each."""
    groups = sizes.shape[0]
    if groups > 1024:
        return jnp.cumsum(sizes) - sizes
    index = jnp.arange(groups, dtype=jnp.int32)
    return jnp.where(index[None, :] < index[:, None], sizes[None, :], 0).sum(1, dtype=jnp.int32)


def _cut(sizes: Int[Array, "G"], starts: Int[Array, "G"], pairs: int, size: int):
    """Cuts each group into tiles: `(group [N], start [N], rows [N], count [])`, N a static bound."""
    groups = sizes.shape[0]
    bound = max_tiles(pairs, groups, size)
    tiles_of_group = -(-sizes // size)
    first = _offsets(tiles_of_group)
    count = tiles_of_group.sum()
    index = jnp.arange(bound, dtype=jnp.int32)
    if bound * groups <= 2**20:
        group = ((first + tiles_of_group)[None, :] <= index[:, None]).sum(1, dtype=jnp.int32)
    else:
        group = jnp.repeat(jnp.arange(groups, dtype=jnp.int32), tiles_of_group, total_repeat_length=bound)
    group = jnp.minimum(group, groups - 1)
    within = (index - first[group]) * size
    live = index < count
    start = jnp.where(live, starts[group] + within, 0)
    used = jnp.where(live, jnp.minimum(size, sizes[group] - within), 0)
    return group, start, used, count


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

"""Runs of sorted rows, cut into tiles: what plans are made of, on every backend."""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.constants import BASE_SLOT
from pallas_kernels.pytrees import pytree

MAX_TILE_ROWS = 128
MIN_TILE_ROWS = 8
READABLE = 64  # entries past the end of `RoutingPlan.before`


@pytree
@dataclass(frozen=True)
class Tiles:
    """Runs of sorted rows that belong together: `count` tiles of at most `size` rows, the rest of the table empty.

    Attributes:
      expert: int32 `[N]`, the expert of all rows of a tile.
      slot: int32 `[N]`, their slot in a table of LoRA tiles; `BASE_SLOT` elsewhere.
      start: int32 `[N]`, a tile's first sorted row.
      rows: int32 `[N]`, rows of a tile.
      count: int32, tiles in use: a scalar, or a vector whose first value it is.
      size: static, rows that a tile can hold.
    """

    expert: Int[Array, "N"]
    slot: Int[Array, "N"]
    start: Int[Array, "N"]
    rows: Int[Array, "N"]
    count: Int[Array, "*vector"]
    size: int = field(metadata={"static": True})


class RowLayout(NamedTuple):
    """How a backend lays out sorted rows.

    Attributes:
      alignment: each expert's first row is a multiple of it.
      tile_rows: rows that a tile holds.
      gaps: how many times rows can be left out to align what follows: with it Q has a static bound.
    """

    alignment: int
    tile_rows: int
    gaps: int


class Pairs(NamedTuple):
    """What a plan sorts.

    Attributes:
      expert: int32 `[P]`, expert of each pair; E for a pair that is skipped.
      slot: int32 `[T]`, slot of each token; S for a token without an adapter.
      key: int32 `[P]`, `expert * (S + 1) + slot`: sorts by expert, then slot, base rows last.
      num_experts: E.
      num_slots: S.
    """

    expert: Int[Array, "P"]
    slot: Int[Array, "T"]
    key: Int[Array, "P"]
    num_experts: int
    num_slots: int


class Places(NamedTuple):
    """Where the pairs of a plan lie.

    Attributes:
      position: int32 `[P]`, pair -> sorted row.
      sizes: int32 `[E]`, rows of each expert.
      starts: int32 `[E]`, first row of each expert.
      segments: int32 `[E, S + 1]`, rows of each expert with each slot; base rows last.
      before: as in `RoutingPlan`.
      tiles: of one expert each.
    """

    position: Int[Array, "P"]
    sizes: Int[Array, "E"]
    starts: Int[Array, "E"]
    segments: Int[Array, "E segments"]
    before: Int[Array, "before"]
    tiles: Tiles


def max_tiles(pairs: int, groups: int, size: int) -> int:
    """Tiles that P pairs in so many groups can take."""
    return pairs // size + min(pairs, groups)


def tile_rows(rows: int, groups: int) -> int:
    """Rows a tile holds: near the mean group, a power of two; from static sizes alone."""
    mean = -(-rows // max(groups, 1))
    return min(max(MIN_TILE_ROWS, 1 << (mean - 1).bit_length()), MAX_TILE_ROWS, max(rows, 1))


def cut_groups(group_sizes: Int[Array, "E"], starts: Int[Array, "E"], pairs: int, size: int) -> Tiles:
    """Tiles of at most `size` rows, each of one expert."""
    expert, start, used, count = _cut(group_sizes, starts, pairs, size)
    return Tiles(expert, jnp.full_like(expert, BASE_SLOT), start, used, count, size)


def cut_segments(segments: Int[Array, "E segments"], starts: Int[Array, "E"], pairs: int) -> Tiles:
    """Tiles of one (expert, slot) each; rows without an adapter are in none."""
    num_experts, num_slots = segments.shape[0], segments.shape[1] - 1
    if num_slots == 0:
        none = jnp.zeros(0, jnp.int32)
        return Tiles(none, none, none, none, jnp.int32(0), tile_rows(pairs, num_experts))
    offsets = starts[:, None] + jnp.cumsum(segments, axis=1) - segments
    sizes, offsets = segments[:, :num_slots], offsets[:, :num_slots]  # the last column is base rows: nothing to do
    size = tile_rows(pairs, num_experts * num_slots)
    segment, start, used, count = _cut(sizes.reshape(-1), offsets.reshape(-1), pairs, size)
    return Tiles(segment // num_slots, segment % num_slots, start, used, count, size)


def offsets_of(sizes: Int[Array, "G"]) -> Int[Array, "G"]:
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
    first = offsets_of(tiles_of_group)
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


def group_start(lower: Int[Array, "N"], group: Int[Array, "N"], alignment: int) -> Int[Array, "N"]:
    """First row of a group that comes after `lower` rows: aligned, and known without the other groups' sizes."""
    return (lower + (group + 1) * (alignment - 1)) & ~(alignment - 1)

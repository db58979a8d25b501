"""The plan's sorted places through XLA, on any device."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.plan.tiles import READABLE, Pairs, Places, RowLayout, cut_groups, group_start, offsets_of, tile_rows
from pallas_kernels.quantised.format import Format

PAIRWISE = 2048  # pairs up to which ranks by comparing all with all are faster than a sort


def layout(pairs: int, num_experts: int, rows_per_tile: int | None = None, formats: Sequence[Format] = ()) -> RowLayout:
    """Experts follow one another; a tile's rows are the given ones or follow from the mean."""
    return RowLayout(1, rows_per_tile or tile_rows(pairs, num_experts), min(num_experts, pairs))


def places(pairs: Pairs, cut: RowLayout, as_kernels_do: bool = False) -> Places:
    """Sorts the pairs and cuts each expert's rows into tiles.

    Args:
      pairs: what is sorted.
      cut: alignment and rows of a tile.
      as_kernels_do: experts begin where the Hopper plan kernels let them begin.
    """
    expert, num_experts = pairs.expert, pairs.num_experts
    segments_per_expert = pairs.num_slots + 1
    lower = _count_below(expert, num_experts + 2)  # pairs whose expert is lower, for 0 .. E + 1
    sizes = lower[1:] - lower[:-1]
    experts_and_none = jnp.arange(num_experts + 1, dtype=jnp.int32)
    if as_kernels_do:
        first = group_start(lower[:-1], experts_and_none, cut.alignment)
    else:
        first = offsets_of(-(-sizes // cut.alignment) * cut.alignment)
    position = _ranks(pairs.key, (num_experts + 1) * segments_per_expert) + (first - lower[:-1])[expert]
    sizes, starts = sizes[:num_experts], first[:num_experts]
    segments = jnp.zeros((num_experts + 1) * segments_per_expert, jnp.int32).at[pairs.key].add(1)
    before = offsets_of(jnp.pad(segments, (0, READABLE)))
    segments = segments.reshape(num_experts + 1, segments_per_expert)[:num_experts]
    tiles = cut_groups(sizes, starts, expert.shape[0], cut.tile_rows)
    return Places(position, sizes, starts, segments, before, tiles)


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

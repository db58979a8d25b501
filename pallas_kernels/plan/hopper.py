"""The plan's sorted places on Hopper: by one kernel for few pairs, by two for many, through XLA beyond these."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.hopper import quantised_tuning, tuned_file
from pallas_kernels.hopper.counting import CountedPlaces
from pallas_kernels.hopper.limits import ROW_ALIGNMENT
from pallas_kernels.plan import hopper_few_pairs, hopper_many_pairs, xla
from pallas_kernels.plan.tiles import BASE_SLOT, READABLE, Pairs, Places, RowLayout, Tiles, max_tiles, offsets_of
from pallas_kernels.quantised.format import Format


def layout(pairs: int, num_experts: int, rows_per_tile: int | None = None, formats: Sequence[Format] = ()) -> RowLayout:
    """TMA reads tiles of 8 rows, so experts begin at multiples of 8; a tile's rows come from the tuned file."""
    rows = rows_per_tile or tuned_file.tile_rows(pairs, num_experts)
    rows = min((quantised_tuning.rows_per_tile(rows, format) for format in formats), default=rows)
    return RowLayout(ROW_ALIGNMENT, rows, num_experts + 1)


def places(pairs: Pairs, cut: RowLayout) -> Places:
    """As `plan.xla.places`, with the kernel's rule for where an expert begins: no block waits for another's counts."""
    tokens, count = pairs.slot.shape[0], pairs.expert.shape[0]
    if hopper_few_pairs.runs(count, pairs.num_experts, pairs.num_slots):
        return _of_few_pairs(pairs, cut)
    if hopper_many_pairs.runs(count, pairs.num_experts) and hopper_many_pairs.runs(tokens, pairs.num_slots):
        return _of_many_pairs(pairs, cut)
    return xla.places(pairs, cut, as_kernels_do=True)


def _of_few_pairs(pairs: Pairs, cut: RowLayout) -> Places:
    count, num_experts, num_slots = pairs.expert.shape[0], pairs.num_experts, pairs.num_slots
    unique = pairs.key * count + jnp.arange(count, dtype=jnp.int32)
    bound = max_tiles(count, num_experts, cut.tile_rows)
    counted, before = hopper_few_pairs.places_and_tiles(
        unique, num_slots + 1, num_experts, cut.alignment, cut.tile_rows, bound
    )
    bounds = before[: num_experts * (num_slots + 1) + 1]
    segments = (bounds[1:] - bounds[:-1]).reshape(num_experts, num_slots + 1)
    return _places(counted, counted.position, segments, before, cut)


def _of_many_pairs(pairs: Pairs, cut: RowLayout) -> Places:
    expert, num_experts, num_slots = pairs.expert, pairs.num_experts, pairs.num_slots
    count, tokens = expert.shape[0], pairs.slot.shape[0]
    by_slot = None
    if num_slots:  # tokens sorted by slot, then their pairs by expert
        by_slot = hopper_many_pairs.places(pairs.slot, num_slots).position
        token_of = jnp.zeros(tokens, jnp.int32).at[by_slot].set(jnp.arange(tokens), unique_indices=True)
        expert = expert.reshape(tokens, -1)[token_of].reshape(count)
    bound = max_tiles(count, num_experts, cut.tile_rows)
    counted = hopper_many_pairs.places(expert, num_experts, cut.alignment, cut.tile_rows, bound)
    position, segments = counted.position, counted.sizes[:, None]
    if num_slots:
        position = position.reshape(tokens, -1)[by_slot].reshape(count)
        segments = jnp.zeros((num_experts + 1) * (num_slots + 1), jnp.int32).at[pairs.key].add(1)
        segments = segments.reshape(num_experts + 1, num_slots + 1)[:num_experts]
    return _places(counted, position, segments, _before(counted.sizes, segments), cut)


def _before(sizes: Int[Array, "E"], segments: Int[Array, "E segments"]) -> Int[Array, "before"]:
    """`RoutingPlan.before`: the pairs of lower experts, and of lower slots of the same expert."""
    lower = offsets_of(sizes)
    index = jnp.arange(segments.shape[1])
    of_lower_slots = jnp.where(index[None, :] < index[:, None], segments[:, None, :], 0).sum(2, dtype=jnp.int32)
    routed = jnp.full(READABLE, sizes.sum(), jnp.int32)
    return jnp.concatenate([(lower[:, None] + of_lower_slots).reshape(-1), routed])


def _places(counted: CountedPlaces, position: Array, segments: Array, before: Array, cut: RowLayout) -> Places:
    no_slot = jnp.full_like(counted.tile_expert, BASE_SLOT)
    tiles = Tiles(
        counted.tile_expert, no_slot, counted.tile_start, counted.tile_rows, counted.tile_count, cut.tile_rows
    )
    return Places(position, counted.sizes, counted.starts, segments, before, tiles)

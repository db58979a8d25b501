"""The lists of LoRA steps by their definition, in plain Python: what their kernel must write."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lora_steps.api import LoRASteps, make_lora_steps
from pallas_kernels.lora_steps.entries import PAGES_A_STEP
from pallas_kernels.ops import LayerPages, LoRAPages, RoutingPlan

UNWRITTEN = 10**6  # in entries that no tile has: pages there would be far outside of every pool


def steps_by_definition(plan: RoutingPlan, adapters: LayerPages, slots: jax.Array) -> LoRASteps:
    """The steps of the plan's tiles for one projection, or for two that share their rows.

    Args:
      plan: a plan for Hopper.
      adapters: of the projection, or of both.
      slots: of each token.
    """
    traced = []

    def sizes() -> tuple[jax.Array, ...]:
        """Of the arrays; what is static, `traced` has."""
        traced.extend(make_lora_steps(plan, (adapters,)))
        return traced[0].first, traced[0].count, traced[0].entries

    _, counted, listed = jax.eval_shape(sizes)
    padded = adapters.pad_with_empty_pages()
    pages = tuple(padded[place.module] for place in padded.places)
    entries = np.full(listed.shape, UNWRITTEN, np.int32)
    count = np.zeros(counted.shape, np.int32)
    for tile, wanted in enumerate(entries_of_tiles(plan, pages, padded.a_in_one_pool, np.asarray(slots))):
        entries[:, tile, : len(wanted)] = np.reshape(wanted, (-1, 6)).T
        count[tile] = len(wanted) // PAGES_A_STEP
    first = np.cumsum(count, 0, dtype=np.int32) - count
    return replace(traced[0], first=jnp.asarray(first), count=jnp.asarray(count), entries=jnp.asarray(entries))


def entries_of_tiles(
    plan: RoutingPlan, pages: tuple[LoRAPages, ...], one_pool: bool, slots: np.ndarray
) -> Iterator[list[tuple]]:
    """The entries of each tile in use, whole steps of them."""
    slot_of_row = np.full(plan.order.shape[0], -1)
    slot_of_row[np.asarray(plan.position)] = np.repeat(slots, plan.position.size // slots.size)
    for tile in range(int(plan.tiles.count.reshape(-1)[0])):
        expert, start, used = (int(x[tile]) for x in (plan.tiles.expert, plan.tiles.start, plan.tiles.rows))
        of_tile = slot_of_row[start : start + used]
        entries = []
        for slot in sorted(set(of_tile) - {-1}):
            (rows,) = np.nonzero(of_tile == slot)
            entries += _entries_of_slot(pages, one_pool, slot, expert, (rows[0], rows[-1] + 1))
        yield entries + [(0,) * 6] * (-len(entries) % PAGES_A_STEP)


def entries_of_few_tokens(
    chosen: np.ndarray, slots: np.ndarray, pages: tuple[LoRAPages, ...], one_pool: bool
) -> dict[int, list[tuple]]:
    """Expert -> the entries of its tile, which has all tokens: of each run of neighbours of one slot that hits it."""
    num_slots, num_experts = pages[0].scale.shape
    lists = {}
    for expert in sorted(set(chosen.reshape(-1)) & set(range(num_experts))):
        entries, first = [], 0
        for slot, run in groupby(slots.tolist()):
            rows = first, first + len(list(run))
            first = rows[1]
            if slot in range(num_slots) and (chosen[slice(*rows)] == expert).any():
                entries += _entries_of_slot(pages, one_pool, slot, expert, rows)
        lists[int(expert)] = entries + [(0,) * 6] * (-len(entries) % PAGES_A_STEP)
    return lists


def _entries_of_slot(
    pages: tuple[LoRAPages, ...], one_pool: bool, slot: int, expert: int, rows: tuple[int, int]
) -> list[tuple]:
    """The entries of one slot in one tile, as `lora_steps/api.py` defines them."""
    tables = [np.asarray(own.table)[slot, expert] for own in pages]
    scales = [np.asarray(own.scale)[slot, expert].view(np.int32) for own in pages]
    (a, b, count, _), last = tables[0], tables[-1]
    if len(pages) == 1:
        return [(a + page, b + page, b + page, *rows, scales[0]) for page in range(count)]
    if one_pool and a == last[0] and count == last[2] and scales[0] == scales[1]:
        return [(a + page, b + page, last[1] + page, *rows, scales[0]) for page in range(count)]
    second = [last[0] + page if one_pool else ~(last[0] + page) for page in range(last[2])]
    return [(a + page, b + page, 0, *rows, scales[0]) for page in range(count)] + [
        (page_a, 0, last[1] + page, *rows, scales[1]) for page, page_a in enumerate(second)
    ]


def random_pages(rng, slots: int, experts: int, ranks: tuple[int, ...], pool: jax.Array) -> LoRAPages:
    """Pages for a random half of the (slot, expert) pairs; no slot has adapters for expert 0."""
    rank = np.where(rng.random((slots, experts)) < 0.5, rng.choice(ranks, (slots, experts)), 0)
    rank[:, 0] = 0
    first = rng.integers(1, 10**6, (2, slots, experts)) * (rank > 0)
    table = np.stack([*first, -(-rank // 16), rank], -1)
    scale = rng.normal(size=(slots, experts)).astype(np.float32)
    return LoRAPages(pool, pool, jnp.asarray(table, jnp.int32), jnp.asarray(scale), max(ranks))

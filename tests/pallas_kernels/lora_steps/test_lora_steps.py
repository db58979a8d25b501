"""The lists of steps that the Hopper kernels read, against their definition."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.lora_steps.api import make_lora_steps
from pallas_kernels.ops import LayerPages, LoRAPages, make_plan

pytestmark = pytest.mark.usefixtures("interpreter")


def random_pages(rng, slots: int, experts: int, ranks: tuple[int, ...], pool: jax.Array) -> LoRAPages:
    """Pages for a random half of the (slot, expert) pairs; no slot has adapters for expert 0."""
    rank = np.where(rng.random((slots, experts)) < 0.5, rng.choice(ranks, (slots, experts)), 0)
    rank[:, 0] = 0
    first = rng.integers(1, 10**6, (2, slots, experts)) * (rank > 0)
    table = np.stack([*first, -(-rank // 16), rank], -1)
    scale = rng.normal(size=(slots, experts)).astype(np.float32)
    return LoRAPages(pool, pool, jnp.asarray(table, jnp.int32), jnp.asarray(scale), max(ranks))


def listed(pages: tuple[LoRAPages, ...], one_pool: bool, slot: int, expert: int, rows: tuple[int, int]) -> list[tuple]:
    """The entries of one slot in one tile, by the definition in `lora_steps/api.py`."""
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "slots", "ranks", "one_pool"),
    [
        (40, 3, (4, 40), True),
        pytest.param(40, 3, (16,), False, marks=pytest.mark.newest),
        (9, 70, (4, 128), True),
        (100, 70, (17,), True),
    ],
)
def test_lists_of_steps_equal_their_definition(tokens, slots, ranks, one_pool):
    rng = np.random.default_rng(0)
    experts, top_k = 4, 2
    chosen = rng.integers(0, experts + 1, (tokens, top_k))
    of_token = rng.integers(-1, slots, tokens)
    pool, other = jnp.zeros((1, 16, 64), "bfloat16"), jnp.zeros((1, 16, 64), "bfloat16")
    gate, up, down = (random_pages(rng, slots, experts, ranks, pool) for _ in range(3))
    alias = rng.random((slots, experts)) < 0.5
    up = replace(up, table=jnp.where(alias[..., None], gate.table.at[..., 1].add(7), up.table))
    up = replace(up, scale=jnp.where(alias, gate.scale, up.scale), a=pool if one_pool else other)
    plan = make_plan(jnp.asarray(chosen, jnp.int32), jnp.asarray(of_token, jnp.int32), experts, slots, "hopper")
    slot_of_row = np.full(plan.order.shape[0], -1)
    slot_of_row[np.asarray(plan.position)] = np.repeat(of_token, top_k)
    adapters = LayerPages.from_modules({"gate": gate, "up": up, "down": down})
    projections = adapters.select("gate", "up"), adapters.select("down")
    for pages, steps in zip(((gate, up), (down,)), make_lora_steps(plan, projections), strict=True):
        free = 0
        for tile in range(int(plan.tiles.count.reshape(-1)[0])):
            expert, start, used = (int(x[tile]) for x in (plan.tiles.expert, plan.tiles.start, plan.tiles.rows))
            of_tile = slot_of_row[start : start + used]
            wanted = []
            for slot in sorted(set(of_tile) - {-1}):
                (rows,) = np.nonzero(of_tile == slot)
                wanted += listed(pages, one_pool, slot, expert, (rows[0], rows[-1] + 1))
            count, first = int(steps.count[tile, 0]), int(steps.first[tile, 0])
            assert count == -(-len(wanted) // 4)
            wanted += [(0,) * 6] * (4 * count - len(wanted))
            np.testing.assert_array_equal(
                np.asarray(steps.entries)[:, tile, : 4 * count].T.reshape(-1, 6), wanted or np.zeros((0, 6))
            )
            assert first >= free, "two tiles share an H"
            free = first + count
        assert free <= steps.bound

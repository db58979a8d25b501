"""The lists of steps that the Hopper kernels read, against their definition."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.lora_steps.api import make_lora_steps
from pallas_kernels.ops import LayerPages, make_plan
from support.lora_steps import entries_of_tiles, random_pages

pytestmark = pytest.mark.usefixtures("interpreter")


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
    adapters = LayerPages.from_modules({"gate": gate, "up": up, "down": down})
    projections = adapters.select("gate", "up"), adapters.select("down")
    for pages, steps in zip(((gate, up), (down,)), make_lora_steps(plan, projections), strict=True):
        free = 0
        for tile, wanted in enumerate(entries_of_tiles(plan, pages, one_pool, of_token)):
            count, first = int(steps.count[tile, 0]), int(steps.first[tile, 0])
            assert 4 * count == len(wanted)
            np.testing.assert_array_equal(
                np.asarray(steps.entries)[:, tile, : 4 * count].T.reshape(-1, 6), wanted or np.zeros((0, 6))
            )
            assert first >= free, "two tiles share an H"
            free = first + count
        assert free <= steps.bound

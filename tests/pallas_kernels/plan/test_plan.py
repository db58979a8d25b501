"""The routing plan, bit for bit against a definition in plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ops import BASE_SLOT, make_plan
from pallas_kernels.plan.api import row_experts, row_slots

SLOW = (pytest.mark.slow, pytest.mark.newest)
PLAN = jax.jit(make_plan, static_argnums=(2, 3))
CASES = {  # T, K, E, S
    "one token": (1, 2, 8, 4),
    "one expert": (9, 1, 1, 3),
    "no slots": (20, 2, 4, 0),
    "one slot": (33, 3, 8, 1),
    "many slots": (40, 2, 8, 256),
    "many experts": (17, 8, 256, 32),
    "many rows": (500, 4, 64, 8),
    "more tiles than rows": (3, 2, 128, 2),
}
QUICK = ("one token", "one slot", "no slots", "more tiles than rows")
MARKED = [pytest.param(case, marks=() if case in QUICK else SLOW) for case in CASES]


def definition(experts: np.ndarray, slots: np.ndarray, num_experts: int, num_slots: int) -> list[tuple[int, int, int]]:
    """(expert, slot, pair) of each sorted row: a stable sort of the pairs by expert, then slot, base rows last."""
    rows = []
    for pair, expert in enumerate(experts.reshape(-1)):
        slot = slots[pair // experts.shape[1]]
        slot = slot if 0 <= slot < num_slots else num_slots
        rows.append((expert if 0 <= expert < num_experts else num_experts, slot, pair))
    return [(e, BASE_SLOT if s == num_slots else s, p) for e, s, p in sorted(rows)]


def draw(case: str, kind: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    tokens, top_k, experts, slots = CASES[case]
    rng = np.random.default_rng(seed)
    chosen = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)]).astype(np.int32)
    of_token = rng.integers(-1, slots, tokens).astype(np.int32) if slots else np.full(tokens, -1, np.int32)
    if kind == "all on one expert":
        chosen[:] = experts - 1
    if kind == "one adapter":
        of_token[:] = slots - 1
    if kind == "out of range":
        chosen[rng.random(chosen.shape) < 0.3] = rng.choice([-1, experts, 10**9])
        of_token[rng.random(tokens) < 0.3] = rng.choice([-7, slots, 10**9])
    return chosen, of_token


@pytest.mark.parametrize("kind", ["uniform", "all on one expert", "one adapter", "out of range"])
@pytest.mark.parametrize("case", MARKED)
def test_plan_equals_its_definition(case, kind):
    _, top_k, num_experts, num_slots = CASES[case]
    experts, slots = draw(case, kind)
    plan = PLAN(jnp.asarray(experts), jnp.asarray(slots), num_experts, num_slots)
    rows = definition(experts, slots, num_experts, num_slots)
    np.testing.assert_array_equal(plan.order, [pair for _, _, pair in rows])
    np.testing.assert_array_equal(plan.position[plan.order], np.arange(len(rows)))
    np.testing.assert_array_equal(plan.token, [pair // top_k for _, _, pair in rows])
    sizes = [sum(expert == e for e, _, _ in rows) for expert in range(num_experts)]
    np.testing.assert_array_equal(plan.group_sizes, sizes)
    np.testing.assert_array_equal(row_experts(plan), [e for e, _, _ in rows])
    live = [s if e < num_experts else BASE_SLOT for e, s, _ in rows]
    np.testing.assert_array_equal(row_slots(plan), live)


@pytest.mark.parametrize("kind", ["uniform", "all on one expert", "one adapter", "out of range"])
@pytest.mark.parametrize("case", MARKED)
def test_tiles_cover_each_row_once_and_base_rows_are_in_no_lora_tile(case, kind):
    _, _, num_experts, num_slots = CASES[case]
    experts, slots = draw(case, kind, seed=1)
    plan = PLAN(jnp.asarray(experts), jnp.asarray(slots), num_experts, num_slots)
    rows = definition(experts, slots, num_experts, num_slots)
    for tiles, wanted in (
        (plan.tiles, [i for i, (e, _, _) in enumerate(rows) if e < num_experts]),
        (plan.lora_tiles, [i for i, (e, s, _) in enumerate(rows) if e < num_experts and s != BASE_SLOT]),
    ):
        covered = []
        count = int(tiles.count)
        assert count <= len(tiles.expert)
        assert not np.asarray(tiles.rows[count:]).any()
        for index in range(count):
            begin, used = int(tiles.start[index]), int(tiles.rows[index])
            assert 1 <= used <= tiles.size
            covered += range(begin, begin + used)
            for row in range(begin, begin + used):
                assert rows[row][0] == int(tiles.expert[index])
                assert int(tiles.slot[index]) in (rows[row][1], BASE_SLOT)
        assert covered == wanted


def test_cost_follows_the_routed_rows_and_not_the_experts():
    """Tiles in use, which are the loop's trips, are the same for 8 experts and for 256 where 8 are hit."""
    experts = jnp.asarray(np.random.default_rng(0).integers(0, 8, (64, 2)), jnp.int32)
    slots = jnp.full(64, -1, jnp.int32)
    few, many = (PLAN(experts, slots, e, 0).tiles for e in (64, 256))
    assert few.size == many.size
    assert int(few.count) == int(many.count) <= 64 * 2 // few.size + 8

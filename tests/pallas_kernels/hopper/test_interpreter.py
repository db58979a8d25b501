"""The Hopper kernels in jax's GPU interpreter, with race detection, on small shapes. No GPU is needed.

Memory that a kernel has not written reads as NaN there, and so do pages that nobody owns.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from support.paged import PagedLayer, PagedSpec, draw_layer
from support.plans import assert_kernel_makes_the_plan_of_xla

from pallas_kernels.dispatch.api import dispatch
from pallas_kernels.grouped_matmul import hopper
from pallas_kernels.hopper import ring
from pallas_kernels.hopper.tuning import MAX_ROWS, Config, heuristic, smem_bytes
from pallas_kernels.lora_steps.api import make_steps
from pallas_kernels.ops import LoRAPages, grouped_matmul, make_plan
from pallas_kernels.plan import hopper_few_pairs, hopper_many_pairs

TOLERANCE = 1e-2  # bfloat16
SPEC = PagedSpec(14, 192, 192, 3, 2, slots=4, ranks=(4, 16, 17, 40))
CONFIGS = {
    "8 rows": Config(8, 3, num_sms=2, apart=True),
    "one warpgroup": Config(16, 4, 1, num_sms=3, apart=True),
    "24 rows": Config(24, 2, num_sms=3, apart=True),
    "as wide as a tile has rows": Config(48, 2, num_sms=2, apart=True, widths=(8, 16)),
    "128 rows": Config(128, 3, num_sms=2, apart=True, widths=(64,)),
}


@pytest.fixture(scope="module")
def layer() -> PagedLayer:
    return draw_layer(SPEC, np.random.default_rng(0))


@pytest.fixture(autouse=True)
def interpreter(capfd):
    """Fails where the interpreter reports a race: it prints and goes on."""
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield
    assert "RACE DETECTED" not in capfd.readouterr().out


def run(layer: PagedLayer, modules: tuple[str, ...], config: Config, slots=None, adapters=None) -> np.ndarray:
    """One projection's rows by pair `[P, out]`."""
    spec = layer.spec
    used = layer.adapters if adapters is None else adapters
    slots = layer.slots if slots is None else slots
    plan = make_plan(layer.chosen, slots, spec.experts, spec.slots, "hopper", config.tile_rows)
    weights = tuple(getattr(layer.experts, m) for m in modules)
    x = jax.random.normal(jax.random.key(0), (spec.tokens, weights[0].shape[2]), spec.dtype)
    pages = tuple(used.get(m) for m in modules)
    (rows,) = hopper.grouped_matmul(x, weights, plan, True, pages, "silu", config=config)
    return np.asarray(rows.astype(jnp.float32))[np.asarray(plan.position)]


def expected(layer: PagedLayer, modules: tuple[str, ...]) -> np.ndarray:
    spec = layer.spec
    width = getattr(layer.experts, modules[0]).shape[2]
    x = np.asarray(
        jax.random.normal(jax.random.key(0), (spec.tokens, width), spec.dtype).astype(jnp.float32), np.float64
    )
    out = []
    for t, experts in enumerate(np.asarray(layer.chosen)):
        for expert in experts:
            values = [layer._linear(x[t], m, int(layer.slots[t]), int(expert)) for m in modules]
            out.append(values[0] if len(values) == 1 else values[0] / (1 + np.exp(-values[0])) * values[1])
    return np.stack(out)


@pytest.mark.slow
@pytest.mark.parametrize("modules", [("gate", "up"), ("down",)], ids="+".join)
@pytest.mark.parametrize("config", CONFIGS)
def test_matmul_shrink_and_expand_equal_the_oracle_without_races(layer, config, modules):
    actual, wanted = run(layer, modules, CONFIGS[config]), expected(layer, modules)
    assert np.linalg.norm(actual - wanted) / np.linalg.norm(wanted) < TOLERANCE
    base = np.repeat(np.asarray(layer.slots) < 0, layer.spec.top_k)
    assert base.any()
    np.testing.assert_array_equal(actual[base], run(layer, modules, CONFIGS[config], adapters={})[base])


@pytest.mark.slow
@pytest.mark.parametrize("slots", [2, 9])
def test_adapters_anywhere_in_long_tiles(slots):
    """The shrink's windows: wide and narrow, at both ends of a tile and between, and several of one run of rows."""
    spec = PagedSpec(620, 64, 64, 2, 1, slots, (16, 32), ("per_expert",), base_rows=0.05)
    drawn = draw_layer(spec, np.random.default_rng(1))
    config = Config(184, 2, num_sms=2, apart=True, widths=(48, 96))
    actual, wanted = run(drawn, ("gate", "up"), config), expected(drawn, ("gate", "up"))
    assert np.linalg.norm(actual - wanted) / np.linalg.norm(wanted) < TOLERANCE
    base = np.asarray(drawn.slots) < 0
    np.testing.assert_array_equal(actual[base], run(drawn, ("gate", "up"), config, adapters={})[base])


@pytest.mark.slow
@pytest.mark.parametrize("modules", [("gate", "up"), ("down",)], ids="+".join)
@pytest.mark.parametrize("config", ["24 rows", "128 rows"])
def test_biases_clamped_swiglu_and_kept_factors_equal_the_reference_without_races(layer, config, modules):
    """gpt-oss's experts, and what training keeps; a bias of the last expert ends where its array does."""
    spec, gated = layer.spec, len(modules) == 2
    plan = make_plan(layer.chosen, layer.slots, spec.experts, spec.slots, "hopper")
    weights, pages = tuple(getattr(layer.experts, m) for m in modules), tuple(layer.adapters[m] for m in modules)
    keys = jax.random.split(jax.random.key(3), 3)
    x = 2 * jax.random.normal(keys[0], (spec.tokens, weights[0].shape[2]), spec.dtype)
    biases = tuple(4 * jax.random.normal(key, w.shape[:2], spec.dtype) for key, w in zip(keys[1:], weights))  # noqa: B905
    own = {"biases": biases, "config": CONFIGS[config], "keep": gated}
    found = hopper.grouped_matmul(x, weights, plan, True, pages, "clamped_swiglu", **own)
    call = partial(grouped_matmul, x, plan=plan, of_tokens=True, implementation="reference")
    wanted = [call(weights[0] if not gated else weights, biases=biases, adapters=pages, activation="clamped_swiglu")]
    if gated:
        wanted += [call(w, biases=(b,), adapters=(a,)) for w, b, a in zip(weights, biases, pages, strict=True)]
    for one, other in zip(found, wanted, strict=True):
        one, other = (np.asarray(rows.astype(jnp.float32))[np.asarray(plan.position)] for rows in (one, other))
        assert np.linalg.norm(one - other) / np.linalg.norm(other) < TOLERANCE


@pytest.mark.long
def test_a_projection_without_adapters_beside_one_that_has_them(layer):
    config = CONFIGS["24 rows"]
    only_up = {"up": layer.adapters["up"]}
    own = {key: value for key, value in layer.matrices.items() if key[0] == "up"}
    actual = run(layer, ("gate", "up"), config, adapters=only_up)
    wanted = expected(replace(layer, matrices=own), ("gate", "up"))
    assert np.linalg.norm(actual - wanted) / np.linalg.norm(wanted) < TOLERANCE


@pytest.mark.long
def test_no_rows_at_all_is_no_hang(layer):
    """All pairs skipped: no tile, no item, nothing waits."""
    plan = make_plan(jnp.full_like(layer.chosen, -1), layer.slots, 3, 4, "hopper")
    x = jnp.ones((layer.spec.tokens, layer.spec.hidden), "bfloat16")
    hopper.grouped_matmul(x, (layer.experts.gate,), plan, True, (None,), "silu", config=CONFIGS["8 rows"])


@pytest.mark.parametrize(("tokens", "top_k", "width", "num_sms"), [(5, 2, 128, 2), (37, 3, 64, 3), (40, 1, 192, 2)])
def test_dispatch_copies_each_row_to_its_places(tokens, top_k, width, num_sms):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(tokens, width)), "bfloat16")
    position = rng.permutation(tokens * top_k + 9)[: tokens * top_k].astype(np.int32)
    rows = dispatch(x, jnp.asarray(position), tokens * top_k + 9, num_sms)
    np.testing.assert_array_equal(np.asarray(rows)[position], np.repeat(np.asarray(x), top_k, 0))


def test_every_heuristic_config_fits():
    for pairs in (1, 7, 64, 1000, 4096, 65536, 10**6):
        for experts in (1, 8, 64, 128, 256):
            config = heuristic(pairs, experts)
            assert config.tile_rows % 8 == 0
            assert 8 <= config.tile_rows <= MAX_ROWS
            assert all(0 < width < config.tile_rows and width % 8 == 0 for width in config.widths)
            assert config.stages >= 2
            assert smem_bytes(config) + ring.BARRIER_BYTES <= ring.SMEM_BYTES


@pytest.mark.parametrize(
    ("kernel", "tokens", "top_k", "experts", "slots"),
    [
        (hopper_few_pairs, 5, 2, 8, 3),
        pytest.param(hopper_few_pairs, 100, 3, 70, 0, marks=pytest.mark.long),
        (hopper_few_pairs, 40, 8, 128, 8),
        pytest.param(hopper_few_pairs, 3, 2, 256, 64, marks=pytest.mark.slow),
        (hopper_many_pairs, 5, 2, 8, 3),
        (hopper_many_pairs, 300, 2, 70, 0),
        pytest.param(hopper_many_pairs, 700, 3, 128, 8, marks=pytest.mark.long),
        pytest.param(hopper_many_pairs, 200, 8, 256, 64, marks=pytest.mark.slow),
    ],
)
def test_the_plan_kernels_equal_the_plan_through_xla(kernel, tokens, top_k, experts, slots, monkeypatch):
    assert_kernel_makes_the_plan_of_xla(kernel, (tokens, top_k, experts, slots), monkeypatch)


def random_pages(rng, slots: int, experts: int, ranks: tuple[int, ...], pool: jax.Array) -> LoRAPages:
    """Pages for a random half of the (slot, expert) pairs; no slot has adapters for expert 0."""
    rank = np.where(rng.random((slots, experts)) < 0.5, rng.choice(ranks, (slots, experts)), 0)
    rank[:, 0] = 0
    first = rng.integers(1, 10**6, (2, slots, experts)) * (rank > 0)
    table = np.stack([*first, -(-rank // 16), rank], -1)
    scale = rng.normal(size=(slots, experts)).astype(np.float32)
    return LoRAPages(pool, pool, jnp.asarray(table, jnp.int32), jnp.asarray(scale), max(ranks))


def listed(pages: tuple[LoRAPages, ...], one_pool: bool, slot: int, expert: int, rows: tuple[int, int]) -> list[tuple]:
    """The entries of one slot in one tile, by the definition in `steps.py`."""
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


@pytest.mark.parametrize(
    ("tokens", "slots", "ranks", "one_pool"),
    [
        pytest.param(40, 3, (4, 40), True, marks=pytest.mark.long),
        (40, 3, (16,), False),
        pytest.param(9, 70, (4, 128), True, marks=pytest.mark.long),
        pytest.param(100, 70, (17,), True, marks=pytest.mark.long),
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
    for pages, steps in zip(((gate, up), (down,)), make_steps(plan, ((gate, up), (down,))), strict=True):
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


def test_steps_of_other_adapters_are_refused(layer):
    spec = layer.spec
    plan = make_plan(layer.chosen, layer.slots, spec.experts, spec.slots, "hopper")
    gate, up, down = (layer.adapters[name] for name in ("gate", "up", "down"))
    (steps,) = make_steps(plan, ((gate, up),))
    rows = jnp.ones((plan.order.shape[0], spec.width), spec.dtype)
    with pytest.raises(ValueError, match="steps were made for other adapters"):
        hopper.grouped_matmul(rows, (layer.experts.down,), plan, False, (down,), "silu", steps)


@pytest.mark.long
def test_xla_reads_a_plan_that_was_made_for_hopper(layer):
    spec = layer.spec
    plan = make_plan(layer.chosen, layer.slots, spec.experts, spec.slots, "hopper")
    own = make_plan(layer.chosen, layer.slots, spec.experts, spec.slots)
    x = jnp.ones((spec.tokens, spec.hidden), spec.dtype)
    rows = [
        grouped_matmul(x, layer.experts.up, p, of_tokens=True, adapters=(layer.adapters["up"],), implementation="xla")
        for p in (plan, own)
    ]
    by_pair = [np.asarray(y)[np.asarray(p.position)] for y, p in zip(rows, (plan, own), strict=True)]
    np.testing.assert_array_equal(*by_pair)

"""The kernels on a GPU: `JAX_PLATFORMS=cuda pytest -m gpu -s -k gpu_kernels`, or `-k portable` for one backend.

The Hopper kernels run on an H100 or H200, the portable ones on these too and on any other GPU from sm_80 on.

Fresh random inputs each run, over shapes that nobody tuned. Pages that nobody owns are NaN, and so is the memory that
results are written to.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora.layer.moe import routed_experts
from pallas_kernels.grouped_matmul import hopper
from pallas_kernels.hopper.tuning import heuristic
from pallas_kernels.ops import LayerPages, make_plan
from pallas_kernels.plan import hopper_few_pairs, hopper_many_pairs
from support.gpu import poison, require
from support.paged import (
    PagedLayer,
    PagedSpec,
    assert_base_rows_exact_and_mixed_equals_solo,
    assert_wrong_slots_are_base_rows,
    draw_layer,
    replicated,
)
from support.plans import assert_kernel_makes_the_plan_of_xla

pytestmark = pytest.mark.gpu

TOLERANCE = {"float16": 2e-3, "bfloat16": 1e-2}
SPECS = {
    "one expert": PagedSpec(50, 128, 64, 1, 1),
    "one token": PagedSpec(1, 256, 192, 8, 2, base_rows=0.0),
    "float16": PagedSpec(70, 192, 320, 8, 3, dtype="float16"),
    "gpt-oss widths": PagedSpec(33, 2880, 2880, 8, 4),
    "64 experts": PagedSpec(301, 512, 448, 64, 6),
    "128 experts": PagedSpec(130, 2048, 768, 128, 8, slots=8, ranks=(4, 8, 16, 17, 32, 64, 100, 128)),
    "256 experts": PagedSpec(500, 256, 128, 256, 8),
    "mixtral widths": PagedSpec(19, 1024, 14336, 4, 2),
    "all rows on one expert": PagedSpec(200, 256, 192, 8, 2, routing="one"),
    "empty experts": PagedSpec(90, 256, 192, 16, 4, routing="half"),
    "one slot": PagedSpec(65, 256, 128, 8, 2, slots=1, ranks=(8,)),
    "32 slots": PagedSpec(257, 256, 192, 8, 2, slots=32, ranks=(4, 16, 64), empty_slots=3),
    "256 slots": PagedSpec(1000, 128, 192, 4, 2, slots=256, ranks=(4, 16, 20), empty_slots=11),
    "a long tile an expert": PagedSpec(1000, 256, 192, 16, 2, slots=8, ranks=(4, 16, 17, 40)),
    "many rows": PagedSpec(3001, 320, 192, 4, 2, slots=8),
    "many rows, float16": PagedSpec(2500, 256, 448, 8, 4, slots=8, dtype="float16"),
    "many rows, 128 experts": PagedSpec(4100, 512, 320, 128, 8, slots=8),
    "all base rows": PagedSpec(40, 256, 192, 8, 2, base_rows=1.0),
    "empty slots": PagedSpec(40, 256, 192, 8, 2, empty_slots=4),
}


# What the portable kernels may get wrong apart from the others: tiles of 32 and of 64 rows, columns in 64 and in 128.
PORTABLE = (
    "one token",
    "float16",
    "gpt-oss widths",
    "128 experts",
    "all rows on one expert",
    "empty experts",
    "32 slots",
    "many rows, float16",
    "empty slots",
)
CASES = [("hopper", name) for name in SPECS] + [("portable", name) for name in PORTABLE]
BACKENDS = ("hopper", "portable")


@pytest.fixture(scope="module", params=CASES, ids=": ".join)
def case(request) -> tuple[str, PagedLayer]:
    """A backend, and a layer for it."""
    implementation, name = request.param
    require(implementation)
    return implementation, draw_layer(SPECS[name], np.random.default_rng())


@pytest.fixture(params=BACKENDS)
def implementation(request) -> str:
    return request.param


def test_the_layer_equals_the_oracle(case):
    implementation, layer = case
    poison()
    y = np.asarray(layer.function(implementation)(layer.slots, layer.adapters).astype(jnp.float32))
    rows = np.random.default_rng().permutation(layer.spec.tokens)[:48]
    expected = layer.expected(rows)
    actual = y[rows]
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    cosine = (actual * expected).sum() / np.linalg.norm(actual) / np.linalg.norm(expected)
    print(f"\nrelative error {error:.2e}, max abs {np.abs(actual - expected).max():.2e}, cosine {cosine:.7f}")
    assert np.isfinite(y).all()
    assert error <= TOLERANCE[layer.spec.dtype]


def test_base_rows_are_exact_and_mixed_equals_solo(case):
    implementation, layer = case
    poison()
    assert_base_rows_exact_and_mixed_equals_solo(layer, implementation)


def test_an_out_of_range_slot_is_a_base_row(case):
    implementation, layer = case
    assert_wrong_slots_are_base_rows(layer, implementation)


@pytest.mark.parametrize("slot", [1, 2])  # fused, shared outer
@pytest.mark.parametrize("tokens", [40, 3000])
def test_shared_equals_replicated(slot, tokens, implementation):
    layer = draw_layer(PagedSpec(tokens, 256, 192, 8, 2), np.random.default_rng())
    copies = replicated(layer, slot)
    shared = layer.function(implementation)(layer.slots, layer.adapters)
    assert bool((copies.function(implementation)(layer.slots, copies.adapters) == shared).all())


def test_a_rows_bits_do_not_depend_on_how_wide_its_tile_is_multiplied():
    require("hopper")
    layer = draw_layer(SPECS["a long tile an expert"], np.random.default_rng())
    plan = make_plan(layer.chosen, layer.slots, layer.spec.experts, layer.spec.slots, "hopper")
    config = heuristic(layer.chosen.size, layer.spec.experts)
    assert config.tile_rows == plan.tiles.size
    assert len(np.unique(np.searchsorted(config.widths, np.asarray(plan.tiles.rows)))) > 1
    weights, pages = (layer.experts.gate, layer.experts.up), layer.adapters.select("gate", "up")
    some, all_alike = (
        hopper.grouped_matmul(
            layer.x,
            weights,
            plan,
            of_tokens=True,
            biases=(None, None),
            adapters=pages,
            steps=None,
            activation="silu",
            config=own,
        )[plan.position]
        for own in (config, replace(config, widths=()))
    )
    assert bool((some == all_alike).all())


@pytest.mark.parametrize("side", ["a", "b"])
def test_zero_adapters_are_exact(side, implementation):
    layer = draw_layer(PagedSpec(60, 256, 192, 8, 2), np.random.default_rng())
    run = layer.function(implementation)
    zero = LayerPages.from_modules(
        {
            module: replace(pages, **{side: jnp.zeros_like(getattr(pages, side))})
            for module, pages in ((module, layer.adapters[module]) for module in layer.adapters.modules)
        }
    )
    assert bool((run(layer.slots, zero) == run(layer.slots, None)).all())


@pytest.mark.parametrize("name", ["128 experts", "many rows"])
def test_a_thousand_replays_have_equal_bits(name, implementation):
    layer = draw_layer(SPECS[name], np.random.default_rng())
    run = layer.function(implementation)
    first = run(layer.slots, layer.adapters)
    same = [(run(layer.slots, layer.adapters) == first).all() for _ in range(1000)]
    assert bool(jnp.stack(same).all())


def test_kernels_and_xla_agree(implementation):
    layer = draw_layer(PagedSpec(100, 256, 192, 8, 2), np.random.default_rng())
    kernels = layer.function(implementation)(layer.slots, layer.adapters).astype(jnp.float32)
    xla = layer.function("xla")(layer.slots, layer.adapters).astype(jnp.float32)
    assert float(jnp.linalg.norm(kernels - xla) / jnp.linalg.norm(xla)) < 1e-2


@pytest.mark.parametrize("tokens", [37, 3000])
def test_gpt_oss_experts_equal_the_definition(implementation, tokens):
    """Biases, and the unit that takes both factors; in float32 by the definition."""
    layer = draw_layer(PagedSpec(tokens, 2880, 2880, 8, 4, slots=4, ranks=(4, 40)), np.random.default_rng())
    config = replace(layer.config, activation="clamped_swiglu", expert_bias=True)
    drawn = np.random.default_rng()
    names = ("gate_bias", "up_bias", "down_bias")
    biases = {n: jnp.asarray(drawn.normal(0, 2, (8, 2880)), layer.spec.dtype) for n in names}
    experts = replace(layer.experts, **biases)

    @partial(jax.jit, static_argnums=3)
    def run(x, experts, adapters, implementation):
        return routed_experts(x, layer.gates, layer.chosen, experts, config, adapters, layer.slots, implementation)

    poison()
    found = run(layer.x, experts, layer.adapters, implementation)
    assert found.dtype == layer.spec.dtype
    wide = lambda tree: jax.tree.map(lambda v: v.astype(jnp.float32) if v.dtype == jnp.bfloat16 else v, tree)  # noqa: E731
    with jax.default_matmul_precision("highest"):
        expected = np.asarray(run(wide(layer.x), wide(experts), wide(layer.adapters), "reference"))
    error = np.linalg.norm(np.asarray(found, np.float32) - expected) / np.linalg.norm(expected)
    print(f"\nrelative error {error:.2e}")
    assert error <= TOLERANCE["bfloat16"]
    base = np.asarray(layer.slots) < 0
    alone = run(layer.x, experts, None, implementation)
    np.testing.assert_array_equal(np.asarray(found)[base], np.asarray(alone)[base])


@pytest.mark.parametrize(
    ("kernel", "tokens", "top_k", "experts", "slots"),
    [
        (hopper_few_pairs, 1, 1, 1, 0),
        (hopper_few_pairs, 37, 3, 70, 5),
        (hopper_few_pairs, 512, 8, 256, 256),
        (hopper_many_pairs, 3, 2, 8, 0),
        (hopper_many_pairs, 513, 8, 128, 0),
        (hopper_many_pairs, 2048, 8, 128, 8),
        (hopper_many_pairs, 8192, 8, 256, 256),
        (hopper_many_pairs, 8191, 4, 32, 32),
        (hopper_many_pairs, 40000, 2, 8, 1),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)).removeprefix("pallas_kernels."),
)
def test_the_plan_kernels_equal_the_plan_through_xla(kernel, tokens, top_k, experts, slots, monkeypatch):
    require("hopper")
    assert_kernel_makes_the_plan_of_xla(kernel, (tokens, top_k, experts, slots), monkeypatch)

"""The layer over packed experts on an H100 or H200: `JAX_PLATFORMS=cuda pytest -m gpu -s -k gpu_quantised`.

Fresh random inputs each run; pages that nobody owns are NaN, and so is the memory that results are written to.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora.layer.moe import routed_experts
from pallas_kernels.ops import LayerPages
from pallas_kernels.quantised.format import FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR, MXFP4, int4
from support.gpu import poison, require
from support.packed import packed, wide
from support.paged import (
    PagedLayer,
    PagedSpec,
    assert_base_rows_exact_and_mixed_equals_solo,
    assert_wrong_slots_are_base_rows,
    draw_layer,
    replicated,
)

pytestmark = pytest.mark.gpu("hopper")

TOLERANCE = 1e-2
SMALL = PagedSpec(70, 256, 384, 8, 3)
LONG = PagedSpec(3001, 256, 384, 4, 2, slots=8)
CASES = {
    "fp8_block": (SMALL, FP8_BLOCK),
    "fp8_block, one token": (PagedSpec(1, 256, 256, 8, 2, base_rows=0.0), FP8_BLOCK),
    "fp8_block, many rows": (LONG, FP8_BLOCK),
    "fp8_block, 128 experts": (
        PagedSpec(130, 2048, 768, 128, 8, slots=8, ranks=(4, 8, 16, 17, 32, 64, 100, 128)),
        FP8_BLOCK,
    ),
    "int4_zero, 8 tokens": (PagedSpec(8, 2048, 768, 128, 8, slots=8, ranks=(4, 16, 64)), int4(128, True)),
    "mxfp4, 3 tokens": (PagedSpec(3, 256, 384, 16, 4), MXFP4),
    "fp8_channel": (SMALL, FP8_CHANNEL),
    "fp8_tensor, all rows on one expert": (replace(SMALL, routing="one"), FP8_TENSOR),
    "mxfp4, gpt-oss widths": (PagedSpec(33, 2880, 2880, 8, 4), MXFP4),
    "mxfp4, many rows": (LONG, MXFP4),
    "mxfp4, 32 slots": (PagedSpec(257, 256, 192, 8, 2, slots=32, ranks=(4, 16, 64), empty_slots=3), MXFP4),
    "int4 of 32": (replace(SMALL, routing="half"), int4(32)),
    "int4 of 128": (SMALL, int4(128)),
    "int4_zero": (SMALL, int4(128, True)),
}


@pytest.fixture(scope="module", params=CASES)
def layer(request) -> PagedLayer:
    require("hopper")
    spec, form = CASES[request.param]
    return packed(draw_layer(spec, np.random.default_rng()), form)


def test_the_layer_equals_the_oracle_over_what_the_bits_mean(layer):
    poison()
    y = np.asarray(layer.function("hopper")(layer.slots, layer.adapters).astype(jnp.float32))
    rows = np.random.default_rng().permutation(layer.spec.tokens)[:48]
    expected = wide(layer).expected(rows)
    error = np.linalg.norm(y[rows] - expected) / np.linalg.norm(expected)
    print(f"\nrelative error {error:.2e}")
    assert np.isfinite(y).all()
    assert error <= TOLERANCE


def test_base_rows_are_exact_and_mixed_equals_solo(layer):
    poison()
    assert_base_rows_exact_and_mixed_equals_solo(layer, "hopper")
    assert_wrong_slots_are_base_rows(layer, "hopper")
    run = layer.function("hopper")
    base = run(layer.slots, None)
    zero = LayerPages.from_modules(
        {m: replace(layer.adapters[m], b=jnp.zeros_like(layer.adapters[m].b)) for m in layer.adapters.modules}
    )
    assert bool((run(layer.slots, zero) == base).all()), "adapters of zeros changed rows"


@pytest.mark.parametrize("form", [FP8_BLOCK, MXFP4], ids=lambda form: form.name)
def test_shared_equals_replicated_and_replays_have_equal_bits(form):
    layer = packed(draw_layer(replace(SMALL, slots=4), np.random.default_rng()), form)
    run = layer.function("hopper")
    shared = run(layer.slots, layer.adapters)
    for slot in (1, 2):  # fused, shared outer
        copies = replicated(layer, slot)
        assert bool((copies.function("hopper")(layer.slots, copies.adapters) == shared).all())
    same = [(run(layer.slots, layer.adapters) == shared).all() for _ in range(1000)]
    assert bool(jnp.stack(same).all())


@pytest.mark.parametrize("tokens", [37, 1500])
def test_gpt_oss_experts_in_mxfp4_equal_the_definition(tokens):
    """Biases, and the unit that takes both factors; in float32 by the definition."""
    drawn = np.random.default_rng()
    layer = packed(draw_layer(PagedSpec(tokens, 2880, 2880, 8, 4, slots=4, ranks=(4, 40)), drawn), MXFP4)
    config = replace(layer.config, activation="clamped_swiglu", expert_bias=True)
    names = ("gate_bias", "up_bias", "down_bias")
    layer = replace(
        layer,
        experts=replace(layer.experts, **{n: jnp.asarray(drawn.normal(0, 2, (8, 2880)), "bfloat16") for n in names}),
    )

    @partial(jax.jit, static_argnums=3)
    def run(x, experts, adapters, implementation):
        return routed_experts(x, layer.gates, layer.chosen, experts, config, adapters, layer.slots, implementation)

    poison()
    found = run(layer.x, layer.experts, layer.adapters, "hopper")
    widened = jax.tree.map(
        lambda v: v.astype(jnp.float32) if v.dtype == jnp.bfloat16 else v,
        (layer.x, wide(layer).experts, layer.adapters),
    )
    with jax.default_matmul_precision("highest"):
        expected = np.asarray(run(*widened, "reference"))
    error = np.linalg.norm(np.asarray(found, np.float32) - expected) / np.linalg.norm(expected)
    print(f"\nrelative error {error:.2e}")
    assert error <= TOLERANCE
    base = np.asarray(layer.slots) < 0
    np.testing.assert_array_equal(
        np.asarray(found)[base], np.asarray(run(layer.x, layer.experts, None, "hopper"))[base]
    )


def test_gradients_over_packed_experts_are_those_over_what_the_bits_mean():
    layer = packed(draw_layer(PagedSpec(50, 256, 256, 8, 2), np.random.default_rng()), FP8_BLOCK)
    numbers = jax.tree.map(lambda weight: weight.astype(jnp.bfloat16), wide(layer).experts)

    @jax.jit
    def gradients(x, pools, experts):
        def loss(x, pools):
            adapters = replace(layer.adapters, pools=pools)
            y = routed_experts(x, layer.gates, layer.chosen, experts, layer.config, adapters, layer.slots, "hopper")
            return (y.astype(jnp.float32) ** 2).sum()

        return jax.grad(loss, argnums=(0, 1))(x, pools)

    # A page of a pool that nobody owns is NaN in value, and its gradient is zero.
    found, expected = (gradients(layer.x, layer.adapters.pools, experts) for experts in (layer.experts, numbers))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        assert np.linalg.norm(one - other) <= 2e-2 * np.linalg.norm(other)
